"""What the source may not do: load a pickle, or run code that came with a model."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefscan.common.config import Params, load
from prefscan.common.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FLAG = "trust_remote_code"
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LOADERS = {"torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle"}


def faults(source: str) -> list[str]:
    """Each place in a source that loads a pickle or could let a model's own code run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in PICKLES]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in PICKLES else []
                found += [name for n in names if (name := f"{module}.{n.name}") in LOADERS]
            case ast.Attribute() if ast.unparse(node) in LOADERS:
                found.append(ast.unparse(node))
            case ast.keyword(arg="allow_pickle"):
                found.append("allow_pickle")
            case ast.keyword(arg="trust_remote_code", value=value) if ast.unparse(value) != "False":
                found.append(f"{FLAG}={ast.unparse(value)}")
            case ast.Constant(value=str(text)) if text.lstrip("-").replace("-", "_") == FLAG:
                found.append(text)  # a key of options, or of a command line
            case ast.Call(func=ast.Attribute(value=ast.Name(id=str(name)), attr="from_pretrained")):
                # Left out, it is None: transformers then asks on the terminal whether to run the code.
                if name.startswith("Auto") and FLAG not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{name}.from_pretrained without {FLAG}=False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "import dill as d",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "reader = np.load",
        "read(path, allow_pickle=False)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=params.trust)",
        "options = {'trust_remote_code': False}",
        "line = ['vllm', 'serve', '--trust-remote-code']",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, **options)",
    ],
)
def test_each_fault_is_found(source: str) -> None:
    assert len(faults(source)) == 1


@pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(ROOT / "src").as_posix() for path in SOURCES])
def test_no_pickle_is_loaded_and_no_code_of_a_model_is_trusted(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


def sections(value: Any, key: str = "") -> list[str]:
    """The dotted keys of all mappings in params.yaml; the whole is ''."""
    below = value.items() if isinstance(value, dict) else ()
    inner = [found for name, child in below for found in sections(child, f"{key}.{name}".lstrip("."))]
    return [key, *inner] if isinstance(value, dict) else []


@pytest.mark.parametrize("key", sections(yaml.safe_load((ROOT / "params.yaml").read_text())))
def test_no_section_of_the_parameters_takes_the_flag(key: str, tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    section = raw
    for part in key.split(".") if key else []:
        section = section[part]
    section[FLAG] = True
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    # Keys of losses and stages.fetch are names, whose values are no flags; a chat template's arguments have any name.
    if key == "model.chat_template_kwargs":
        return
    named = key == "stages.fetch" or key.split(".")[0] == "losses"
    refused = r"True is refused" if named else r"unknown key \(value True\); remove it"
    with pytest.raises(UserError, match=rf"{FLAG}: {refused}"):
        load(tmp_path / "params.yaml")


def test_no_section_of_the_schema_has_the_flag_or_takes_unknown_keys() -> None:
    schema = Params.model_json_schema()
    for name, section in {"Params": schema, **schema["$defs"]}.items():
        # What train.accelerate does not know goes to accelerate's configuration, which refuses what it does not know.
        # A loss that losses does not know has no key at all.
        others = {"Accelerate": True, "Losses": {"$ref": "#/$defs/LossOptions"}, "LossOptions": {"type": "number"}}
        assert section["additionalProperties"] == others.get(name, False)
        assert not [name for name in section["properties"] if "trust" in name or "remote" in name]
