"""The name of unfinished work: another input, parameter, library or machine is another name, nothing else is."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtbench_data import ROOT
from prefscan.common import fingerprint
from prefscan.common.fingerprint import stage_fingerprint
from prefscan.common.libraries import LIBRARIES

CELL = "ipo-0.3-7"
STAGES = {
    "train": {
        "cmd": "prefscan train ${key}",
        "matrix": {"loss": ["ipo", "kto"]},
        "deps": ["data/pairs", "data/policy/${key}.jsonl", "src/code.py", "${judge.folder}"],
        "params": ["losses.${item.loss}", "seed", "train"],
    },
    "answer-base": {"cmd": "prefscan answer base", "deps": ["src/code.py"]},
}
PARAMS = {
    "seed": 0,
    "threads": 1,
    "train": {"layout": "packed", "lora": {"r": 16}},
    "losses": {"ipo": {"clip": 1.0}, "kto": {"weight": 1.0}},
    "judge": {"folder": "models/judge", "name": "tiny"},
    "runtime": {"report_to": "none"},
}
FILES = (
    "data/pairs/train.jsonl",
    "data/pairs/inner/heldout.jsonl",
    f"data/policy/{CELL}.jsonl",
    "data/policy/kto-0.3-7.jsonl",
    "src/code.py",
    "src/other.py",
    "models/judge/model.safetensors",
    "models/base/model.safetensors",
)


def write(stages: Any = STAGES, params: Any = PARAMS) -> None:
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Path("params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def before(in_tmp: Path) -> str:
    """The fingerprint of a cell in a small repository, which is the working directory."""
    write()
    for name in FILES:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    return stage_fingerprint("train", CELL)


def with_value(key: str, value: Any) -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load(yaml.safe_dump(PARAMS))
    *parents, last = key.split(".")
    section = params
    for part in parents:
        section = section[part]
    section[last] = value
    return params


def test_the_same_work_has_the_same_name(before: str) -> None:
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert stage_fingerprint("train", CELL) == before
    for name in FILES:  # written anew, with the same content
        content = Path(name).read_bytes()
        Path(name).unlink()
        Path(name).write_bytes(content)
    write(dict(reversed(STAGES.items())), dict(reversed(PARAMS.items())))
    assert stage_fingerprint("train", CELL) == before


@pytest.mark.parametrize(
    "name",
    [
        "data/pairs/train.jsonl",
        "data/pairs/inner/heldout.jsonl",
        f"data/policy/{CELL}.jsonl",
        "src/code.py",
        "models/judge/model.safetensors",
        "data/pairs/new.jsonl",
    ],
)
def test_a_file_that_the_stage_declares_is_in_it_and_what_is_in_its_folders(before: str, name: str) -> None:
    Path(name).write_text("other")
    assert stage_fingerprint("train", CELL) != before


@pytest.mark.parametrize("name", ["data/pairs/train.jsonl", f"data/policy/{CELL}.jsonl", "src/code.py"])
def test_a_declared_file_that_goes_or_gets_another_name_is_another(before: str, name: str) -> None:
    Path(name).rename(f"{name}.moved")
    assert stage_fingerprint("train", CELL) != before


@pytest.mark.parametrize(
    "name",
    [
        "src/other.py",
        "models/base/model.safetensors",
        "data/policy/kto-0.3-7.jsonl",  # another cell's
        "data/pairs/__pycache__/code.cpython-311.pyc",
    ],
)
def test_a_file_that_the_stage_does_not_declare_is_not(before: str, name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("other")
    assert stage_fingerprint("train", CELL) == before


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("train.lora.r", 8), ("losses.ipo.clip", 0.5)])
def test_a_declared_parameter_is_in_it(before: str, key: str, value: Any) -> None:
    write(params=with_value(key, value))
    assert stage_fingerprint("train", CELL) != before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 2),
        ("losses.kto.weight", 0.5),
        ("runtime.report_to", "wandb"),
        ("judge.name", "large"),
        ("more", 1),
    ],
)
def test_a_parameter_that_the_stage_does_not_declare_is_not(before: str, key: str, value: Any) -> None:
    write(params=with_value(key, value))
    assert stage_fingerprint("train", CELL) == before


def test_each_cell_and_each_stage_has_its_own(before: str) -> None:
    found = {before, *(stage_fingerprint("train", key) for key in ("ipo-0.3-8", "kto-0.3-7", "ipo-1e-05-7"))}
    assert len(found | {stage_fingerprint("answer-base", "base")}) == 5


def test_what_a_stage_starts_to_depend_on_is_in_it(before: str) -> None:
    more = STAGES["train"] | {"deps": [*STAGES["train"]["deps"], "src/other.py"]}
    write({"train": more})
    assert stage_fingerprint("train", CELL) != before


def test_a_stage_or_parameter_that_is_not_there_is_a_key_error(before: str) -> None:
    with pytest.raises(KeyError, match="tain"):
        stage_fingerprint("tain", CELL)
    write(params={name: value for name, value in PARAMS.items() if name != "seed"})
    with pytest.raises(KeyError, match="seed"):
        stage_fingerprint("train", CELL)
    with pytest.raises(KeyError, match="hinge"):
        stage_fingerprint("train", "hinge-0.3-7")


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_version_of_a_library_is_in_it(before: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(fingerprint, "version", lambda asked: "0" if asked == name else metadata.version(asked))
    assert stage_fingerprint("train", CELL) != before


def test_threads_and_the_processor_are_in_it(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {stage_fingerprint("train", CELL)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found.add(stage_fingerprint("train", CELL))
    monkeypatch.setattr(fingerprint, "processor", lambda: ["model\t\t: 17"])
    found.add(stage_fingerprint("train", CELL))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "none")
    found.add(stage_fingerprint("train", CELL))
    assert len(found) == 4


def test_of_a_gpu_its_name_is_in_it_and_no_processor(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = set()
    for name, threads in (("one", 1), ("one", 2), ("another", 1)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.add(stage_fingerprint("train", CELL))
    assert len(found) == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_the_processor_is_named_without_what_changes() -> None:
    assert fingerprint.processor() == fingerprint.processor() != []
    assert not any("MHz" in line for line in fingerprint.processor())


@pytest.mark.parametrize(
    ("stage", "key"), [("train", "sigmoid-0.1-16"), ("answer", "ipo-0.5-16"), ("answer-base", "base")]
)
def test_the_stages_that_keep_unfinished_work_are_declared_as_it_reads_them(
    monkeypatch: pytest.MonkeyPatch, stage: str, key: str
) -> None:
    """Every `${…}` of their dependencies and parameters is one that it replaces, and every code path is there."""
    monkeypatch.chdir(ROOT)
    seen: list[Path] = []
    files = fingerprint.files
    monkeypatch.setattr(fingerprint, "files", lambda paths: (seen.extend(paths), files(paths))[1])
    stage_fingerprint(stage, key)
    assert not any("$" in str(path) for path in seen)
    code = [path for path in seen if path.parts[0] == "src"]
    assert len(code) > 3
    assert all(path.exists() for path in code)
