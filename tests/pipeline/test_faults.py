"""After a fault `dvc repro` ends with the hashes of a run without it, and what was finished is not run again."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.workspace import Workspace, stages_run

CELL, OTHER = "sigmoid-0.1-3", "kto_pair-0.1-3"
TIMED = ("metrics/cost/", "reports/cells.csv", "reports/report.")  # they hold seconds


def locked(work: Workspace) -> dict[str, dict[str, str]]:
    """The MD5 of every output in dvc.lock, by stage and path, without those that hold seconds."""
    stages = yaml.safe_load((work.folder / "dvc.lock").read_text())["stages"]
    return {
        name: {out["path"]: out["md5"] for out in stage["outs"] if not out["path"].startswith(TIMED)}
        for name, stage in stages.items()
    }


def forget(work: Workspace, *stages: str) -> None:
    """As if these stages had never run: dvc.lock and the run-cache know nothing of them."""
    path = work.folder / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    for stage in stages:
        del lock["stages"][stage]
    path.write_text(yaml.safe_dump(lock))
    for folder in (".dvc/cache/runs", ".prefscan", "runs"):
        shutil.rmtree(work.folder / folder)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of 64 kB over the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,{options}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_and_read_only_folders(sweep: Workspace, tmp_path: Path) -> None:
    """For root, permissions do not count: the folders are file systems that are full, or mounted read-only."""
    work = sweep.copy(tmp_path / "work")
    report, answer, train = "report", f"answer@{OTHER}", f"train@{CELL}"
    forget(work, report, answer, train)
    # In this order: DVC removes a stage's outputs before it runs, and the report reads those of the others.
    for stage, written, options, reason in (
        (report, "reports", "ro", "Read-only file system"),
        (report, "reports", "rw", "No space left on device"),
        (answer, "data/mt_bench/model_answer", "rw", "No space left on device"),
        (train, "models/adapters", "rw", "No space left on device"),
    ):
        folder = work.folder / written
        with mounted(folder, options):
            if options == "rw":
                (folder / "filler").write_bytes(bytes(64 * 1024))
            output = work.dvc("repro", "--single-item", stage, fails=True)
            assert {path.name for path in folder.iterdir()} == ({"filler"} if options == "rw" else set())
        assert "\nprefscan: cannot write" in output
        assert f"{reason}; make room or access and run `dvc repro` again\n" in output
        assert "Traceback" not in output
    assert set(stages_run(work.dvc("repro"))) == {report, answer, train}
    assert locked(work) == locked(sweep)


def kill(work: Workspace, module: str, begun: Callable[[psutil.Process], bool]) -> str:
    """The output of a `dvc repro` whose stage process of the cell gets SIGKILL once it has begun."""
    command = ["-m", "prefscan", module, CELL]
    with tempfile.TemporaryFile("w+") as output:
        dvc = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"], cwd=work.folder, env=work.environment, stdout=output, stderr=output
        )
        while dvc.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(dvc.pid).children(recursive=True):
                    if process.cmdline()[1:] == command and begun(process):
                        process.kill()
            time.sleep(0.01)
        output.seek(0)
        text = output.read()
    assert dvc.returncode != 0, text
    assert f"failed to reproduce '{module}@{CELL}'" in text
    assert re.search("exited with (-9|137)", text)  # 137 where the shell of DVC's command has stayed beside it
    return text


@pytest.mark.slow
def test_kill_9_in_train_answer_and_mtbench(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    train, answer, mtbench = (f"{module}@{CELL}" for module in ("train", "answer", "mtbench"))
    forget(work, train, answer, mtbench)
    in_training, in_answering = work.folder / f"runs/dvclive/{CELL}", work.folder / f".prefscan/answers/{CELL}"
    text = kill(work, "train", lambda _: in_training.exists())
    assert stages_run(text) == [train]
    text = kill(work, "answer", lambda _: in_answering.exists() and any(in_answering.iterdir()))
    assert stages_run(text) == [train, answer]
    text = kill(work, "mtbench", lambda process: any("torch" in Path(m.path).name for m in process.memory_maps()))
    assert stages_run(text) == [answer, mtbench]
    assert stages_run(work.dvc("repro")) == [mtbench, "report"]
    assert locked(work) == locked(sweep)


@pytest.mark.slow
def test_the_remote_is_gone_for_a_while(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    remote, away = tmp_path / "remote", tmp_path / "away"
    work.dvc("remote", "add", "--default", "shared", str(remote))
    work.commit("Add a remote")
    work.dvc("push")
    clone = work.clone(tmp_path / "clone")
    remote.rename(away)
    assert stages_run(clone.dvc("repro", "--pull", "fetch@questions")) == ["check", "fetch@questions"]
    clone.dvc("push")  # DVC makes a folder in the remote's place
    shutil.rmtree(remote)
    away.rename(remote)
    assert stages_run(clone.dvc("repro", "--pull")) == []
    assert locked(clone) == locked(sweep)
    assert clone.dvc("push") == "Everything is up to date.\n"


def listed(cache: Path, work: Workspace, stage: str, folder: str, name: str) -> Path:
    """The object in the cache of a file in a stage's output folder."""
    found = locked(work)[stage][folder]
    (md5,) = (f["md5"] for f in json.loads((cache / found[:2] / found[2:]).read_text()) if f["relpath"] == name)
    return cache / md5[:2] / md5[2:]


def damage(path: Path, content: bytes) -> None:
    """As a failing disk does it: the object stays read-only and of its time."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_damaged_objects_of_the_cache(sweep: Workspace, tmp_path: Path) -> None:
    """A truncated base and an adapter with wrong bytes, in a new clone that shares the cache."""
    work = sweep.copy(tmp_path / "work")
    cache = work.folder / ".dvc/cache/files/md5"
    base = listed(cache, work, "fetch@model", "models/base", "model.safetensors")
    adapter = listed(cache, work, f"train@{CELL}", f"models/adapters/{CELL}", "adapter_model.safetensors")
    damage(base, base.read_bytes()[:1000])
    damage(adapter, adapter.read_bytes()[:-4] + b"\xff\x00\xff\x00")
    clone = work.clone(tmp_path / "clone")
    clone.environment = clone.environment | {"PYTHONPATH": "src"}
    clone.dvc("cache", "dir", "--local", str(work.folder / ".dvc/cache"))
    clone.dvc("checkout")
    assert stages_run(clone.dvc("repro")) == []  # DVC trusts its cache
    assert (clone.folder / "models/base/model.safetensors").stat().st_size == 1000
    output = clone.run(sys.executable, "-m", "prefscan", "check-cache", fails=True)
    removed = [line for line in output.splitlines() if line.startswith("removed ")]
    assert removed == [f"removed {path}: its content has another hash" for path in sorted([base, adapter])]
    assert set(stages_run(clone.dvc("repro"))) == {"fetch@model", f"train@{CELL}", "report"}
    assert locked(clone) == locked(sweep)
    assert clone.run(sys.executable, "-m", "prefscan", "check-cache").endswith(" objects, none damaged\n")
