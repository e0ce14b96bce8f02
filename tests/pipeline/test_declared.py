"""The parameters that dvc.yaml declares are the ones that the stages read: each stage is run and its reads recorded."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from pipeline.workspace import Workspace
from prefscan.common import config
from prefscan.common.config import Params, Runtime, Section

CELL = "kto_pair-0.1-3"
SERVER = {"answer.server"}  # read with `answer.engine: openai` alone
PAIRS = {"judge.against"}  # read with `judge.mode: pair` alone
# Stage in dvc.yaml → module, arguments, and leaves that it declares with the rest of a section without reading them.
STAGES: dict[str, tuple[str, list[str], set[str]]] = {
    "fetch@model": ("fetch", ["model"], {"model.name"}),  # read in error messages only
    "fetch@pairs": ("fetch", ["pairs"], set()),
    "fetch@questions": ("fetch", ["questions"], set()),
    "prepare": ("prepare", [], set()),
    "reference@train": ("reference", ["train"], set()),
    "reference@heldout": ("reference", ["heldout"], set()),
    "train": ("train", [CELL], set()),
    "merge": ("merge", [CELL], set()),
    "answer-base": ("answer", ["base"], SERVER),
    "answer": ("answer", [CELL], SERVER),
    "judge-check": ("judge_check", [], PAIRS),
    "mtbench-base": ("mtbench", ["base"], PAIRS),
    "mtbench": ("mtbench", [CELL], PAIRS),
    "report": ("report", [], PAIRS),
}
# Read only to find a cell among the stages themselves: were it declared, a new β would make every cell stale.
MEMBERSHIP = {"grid.loss", "grid.beta", "grid.steps"}
UNDECLARED = MEMBERSHIP | {f"runtime.{name}" for name in Runtime.model_fields}


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    for name, child in value.items():
        key = f"{prefix}{name}"
        if isinstance(child, dict):
            yield from leaves(child, f"{key}.")
        else:
            yield key


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The dotted leaves of params.yaml that are read from now on."""
    paths: dict[int, str] = {}
    found: set[str] = set()
    loaded: list[Params] = []  # kept alive, or an id could be used again

    def index(section: Section, prefix: str) -> None:
        paths[id(section)] = prefix
        for name, value in section.__dict__.items():
            if isinstance(value, Section):
                index(value, f"{prefix}{name}.")

    def load(*arguments: Any) -> Params:
        loaded.append(original_load(*arguments))
        index(loaded[-1], "")
        return loaded[-1]

    def getattribute(self: Section, name: str) -> Any:
        value = object.__getattribute__(self, name)
        prefix = paths.get(id(self))
        if prefix is not None and name in type(self).model_fields and not isinstance(value, Section):
            found.add(f"{prefix}{name}")
        return value

    original_load = config.load
    for module in {module for module, _, _ in STAGES.values()}:
        monkeypatch.setattr(import_module(f"prefscan.stages.{module}"), "load", load)
    monkeypatch.setattr(Section, "__getattribute__", getattribute)
    return found


@pytest.fixture(scope="module")
def work(sweep: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return sweep.copy(tmp_path_factory.mktemp("declared") / "work")


def declared(stage: str, folder: Path) -> set[str]:
    """The leaves below the keys that a stage declares."""
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    name, _, item = stage.partition("@")
    stage_or_loop = stages[name]
    if name == "fetch":
        keys = [stage_or_loop["foreach"][item]["params"]]
    else:
        loss = CELL.split("-")[0]
        keys = [key.replace("${item.loss}", loss) for key in stage_or_loop.get("do", stage_or_loop)["params"]]
    values = yaml.safe_load((folder / "params.yaml").read_text())
    return {leaf for leaf in leaves(values) if any(leaf == key or leaf.startswith(f"{key}.") for key in keys)}


@pytest.mark.parametrize("stage", STAGES)
def test_declared_parameters_are_the_read_ones(
    stage: str, work: Workspace, reads: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments, unread = STAGES[stage]
    monkeypatch.chdir(work.folder)
    for name, value in work.environment.items():
        monkeypatch.setenv(name, value)
    if stage.startswith("fetch"):
        # The client has read HF_ENDPOINT when it was imported.
        endpoint = work.environment["HF_ENDPOINT"]
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(work.folder.parent / "hub-cache"))
    import_module(f"prefscan.stages.{module}").main(*arguments)
    # A source's kind is read as the class that the schema makes of it.
    expected = {
        leaf
        for leaf in declared(stage, work.folder) - unread
        if not leaf.endswith((".source.kind", "mt_bench.kind", "corrected.kind"))
    }
    assert reads - (UNDECLARED - expected) == expected


def test_the_gate_declares_every_parameter(work: Workspace) -> None:
    stages = yaml.safe_load((work.folder / "dvc.yaml").read_text())["stages"]
    assert set(stages["check"]["params"]) == set(Params.model_fields)
