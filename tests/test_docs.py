"""What the documentation names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELIABILITY = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", RELIABILITY)))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_and_configuration_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(
        r"(?<![\w./-])((?:benchmarks|conf|docs|src|tests)/[\w./-]*\w)", document.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_the_fault_table_names_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_fault_table_names_a_test() -> None:
    rows = [line for line in RELIABILITY.splitlines() if re.match(r"\| (?!fault \||what \|)", line)]
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)] == []


def test_every_fault_of_the_pipeline_is_in_the_table() -> None:
    tree = ast.parse((ROOT / "tests/pipeline/test_faults.py").read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) if node.name.startswith("test_")}
    assert tests <= {test for _, test in NAMED}
