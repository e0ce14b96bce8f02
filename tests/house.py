"""Which modules of prefscan a module imports, at its top or within functions, and which it loads by name."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "prefscan"
MODULES = sorted(PACKAGE.rglob("*.py"))
BY_NAME = {"judging": "make", "logprobs": "pair_logps"}  # folder → a function that each module has which is loaded so


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, of modules or of what is in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: a relative import"
            assert not node.level, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files_of(names: set[str]) -> set[Path]:
    """Those of the names that are modules of prefscan, as files; a package is its `__init__.py`."""
    bases = [SOURCE / name.replace(".", "/") for name in names if name.split(".")[0] == "prefscan"]
    return {file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()}


def loaded_by_name(path: Path) -> set[Path]:
    """The modules of which a file loads the one that a parameter names: those that have what it then calls."""
    text = path.read_text(encoding="utf-8")
    folders = re.findall(r'import_module\(f"prefscan\.(\w+)\.\{', text)
    assert len(folders) == text.count("import_module(") or path.name == "__main__.py", path
    modules = [module for folder in folders for module in (PACKAGE / folder).glob("*.py")]
    return {
        module for module in modules if f"\ndef {BY_NAME[module.parent.name]}(" in module.read_text(encoding="utf-8")
    }


def templates_of(path: Path) -> set[Path]:
    """The files beside the code that a file reads by importlib.resources."""
    packages = re.findall(r'\bfiles\("prefscan\.(\w+)"\)', path.read_text(encoding="utf-8"))
    return {
        file
        for package in packages
        for file in (PACKAGE / package).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }


def closure(path: Path) -> set[Path]:
    """All files of prefscan that running a module may read, itself included, but for packages' empty `__init__.py`."""
    todo, seen, read = {path, PACKAGE / "__init__.py"}, set(), set()
    while todo:
        file = todo.pop()
        seen.add(file)
        read |= templates_of(file)
        todo |= (files_of(imported(file)) | loaded_by_name(file)) - seen
    return {file for file in seen | read if file.read_bytes()}
