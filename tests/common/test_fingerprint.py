"""The key of unfinished work: another input, parameter, module, library or machine is another key."""

import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mtbench_data import ROOT
from prefscan.common import fingerprint as keys
from prefscan.common.fingerprint import result_key

CODE = ("losses.py", "engines")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "data/inner/a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    return tmp_path


def key_of(data: Path, seed: int = 0) -> str:
    return result_key({"seed": seed}, [data / "data", data / "b.txt"], CODE)


def test_the_key_is_stable_and_knows_parameters(data: Path) -> None:
    assert key_of(data) == key_of(data)
    assert len({key_of(data, seed) for seed in range(3)}) == 3


@pytest.mark.parametrize("name", ["data/inner/a.txt", "b.txt", "data/new.txt"])
def test_the_key_knows_files_and_what_is_in_folders(data: Path, name: str) -> None:
    before = key_of(data)
    (data / name).write_text("other")
    assert key_of(data) != before


@pytest.mark.parametrize("name", ["losses.py", "engines/shared.py"])
def test_the_key_knows_the_named_code_alone(data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = key_of(data)
    copy = shutil.copytree(ROOT / "src/prefscan", data / "prefscan")
    monkeypatch.setattr(keys, "__file__", str(copy / "keys.py"))
    (copy / "report.py").write_text("# touched\n")
    assert key_of(data) == before
    (copy / name).write_text((copy / name).read_text() + "\n# touched\n")
    assert key_of(data) != before


def test_the_key_knows_libraries_threads_and_the_processor(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {key_of(data)}
    with monkeypatch.context() as patch:
        patch.setattr(keys, "version", lambda name: "0" if name == "torch" else metadata.version(name))
        found.add(key_of(data))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found.add(key_of(data))
    monkeypatch.setattr(keys, "processor", lambda: ["model\t\t: 17"])
    found.add(key_of(data))
    assert len(found) == 4


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_the_processor_is_named_without_what_changes() -> None:
    assert keys.processor() == keys.processor() != []
    assert not any("MHz" in line for line in keys.processor())
