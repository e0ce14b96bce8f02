"""The sweep on a real Ray cluster of two nodes of 127.0.0.1, through a DVC remote, with faults."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from pipeline.workspace import ROOT, Workspace
from prefscan.launch.clone import Chain, Place


@pytest.fixture
def cluster(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU; what they start has the environment of the tiny workspace."""
    import ray
    from ray.cluster_utils import Cluster

    for name, value in fresh.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=node | {"node_ip_address": "127.0.0.1"})
    found.add_node(**node, node_ip_address="127.0.0.1")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def work(fresh: Workspace, tmp_path: Path) -> Workspace:
    """A workspace in which nothing has run, with a remote and a scratch folder for the nodes."""
    workspace = fresh.copy(tmp_path / "work")
    workspace.environment = workspace.environment | {"PYTHONPATH": str(ROOT / "src")}
    workspace.dvc("remote", "add", "--default", "team", str(tmp_path / "remote"))
    params = workspace.folder / "params.yaml"
    values = yaml.safe_load(params.read_text())
    values["launch"] |= {"scratch": str(tmp_path / "scratch"), "patience": 60}
    params.write_text(yaml.safe_dump(values, sort_keys=False))
    workspace.commit("Add a remote")
    return workspace


def hashes(workspace: Workspace) -> dict[str, Any]:
    """Outputs of every cell's stages in dvc.lock, but for the files that hold seconds."""
    stages = yaml.safe_load((workspace.folder / "dvc.lock").read_text())["stages"]
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", []) if "/cost/" not in out["path"]}
        for name, stage in stages.items()
        if name != "report"  # its pages show the seconds
    }


class Launch:
    def __init__(self, work: Workspace, address: str) -> None:
        self.output = work.folder.parent / "launch.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefscan", "launch", "--address", address],
                cwd=work.folder,
                env=work.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, what: Callable[[], Any], seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return found

    def end(self) -> str:
        code = self.process.wait(600)
        assert code == 0, self.output.read_text()
        return self.output.read_text()


def stage_processes(scratch: Path, module: str, raylet: int | None = None) -> list[psutil.Process]:
    """The processes of a stage that run in a clone: of the stage itself, not of the shell around it.

    With the process id of a node's `raylet`, those of that node.
    """
    found = []
    for process in psutil.process_iter():
        try:
            of_stage = process.cmdline()[1:4] == ["-m", "prefscan", module]
            in_clone = of_stage and Path(process.cwd()).is_relative_to(scratch)
            if in_clone and (raylet is None or raylet in (parent.pid for parent in process.parents())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ray_worker(process: psutil.Process) -> psutil.Process:
    return next(parent for parent in process.parents() if parent.name().startswith("ray::"))


@pytest.mark.slow
def test_whatever_is_killed_a_cluster_gives_the_hashes_of_dvc_repro(
    sweep: Workspace, work: Workspace, cluster: Any, tmp_path: Path
) -> None:
    """Ray's worker of a judging is killed, a node removed under a training, a stage killed, and an answer's worker."""
    scratch = tmp_path / "scratch"
    launch = Launch(work, cluster.address)

    def running(module: str, raylet: int | None = None) -> psutil.Process:
        return launch.wait_for(lambda: stage_processes(scratch, module, raylet))[0]

    # The base's, which comes before the cells: one that lost its worker three times would have failed.
    ray_worker(running("mtbench")).send_signal(signal.SIGKILL)
    (second,) = cluster.worker_nodes
    lost = running("train", second.all_processes["raylet"][0].process.pid)
    cluster.remove_node(second, allow_graceful=False)
    launch.wait_for(lambda: lost not in stage_processes(scratch, "train"))
    running("train").send_signal(signal.SIGKILL)
    ray_worker(running("answer")).send_signal(signal.SIGKILL)
    output = launch.end()
    assert ": failed" not in output
    assert "(10 of 10)" in output
    assert hashes(work) == hashes(sweep)
    assert work.dvc("status").strip().endswith("Data and pipelines are up to date.")
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(scratch) in " ".join(p.info["cmdline"] or [])]


def test_without_a_remote_a_cluster_is_refused(fresh: Workspace, tmp_path: Path) -> None:
    work = fresh.copy(tmp_path / "work")
    work.environment = work.environment | {"PYTHONPATH": str(ROOT / "src")}
    output = work.run(sys.executable, "-m", "prefscan", "launch", "--address", "127.0.0.1:9", fails=True)
    assert re.search(r"--address: results travel between machines by a DVC remote.*dvc remote add --default", output)
    assert "Traceback" not in output


def test_a_paid_judge_needs_a_shared_folder_and_its_key_on_every_node(
    work: Workspace, cluster: Any, tmp_path: Path
) -> None:
    """Both are said before anything runs. The parameters are composed as `dvc exp run -S` would."""
    command = [sys.executable, "-m", "prefscan", "launch", "--dirty", "--address", cluster.address, "judge=gpt4"]
    command += [f"launch.scratch={tmp_path}/scratch"]
    output = work.run(*command, fails=True)
    assert "launch.state: null, and each node would pay the judge anew and keep a budget of its own" in output
    assert yaml.safe_load((work.folder / "params.yaml").read_text())["judge"]["kind"] == "openai"
    assert "OPENAI_API_KEY" not in os.environ
    output = work.run(*command, f"launch.state={tmp_path}/state", fails=True)
    assert "127.0.0.1: OPENAI_API_KEY is not set; export it where `ray start` runs" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "scratch/clones").iterdir())


def test_a_node_that_joined_later_and_is_not_fit_runs_no_cell(tmp_path: Path, params: Any) -> None:
    """The nodes that are there at the start are asked before; this is the task that Ray gives to any of them."""
    from prefscan.launch.runner import Needs, run_on_node

    place = Place(tmp_path / "clones", tmp_path / "cache", tmp_path, remote={}, marker=None)
    needs = Needs({"dvc": "0.1", "no-such-library": "2"}, ["PREFSCAN_TEST_KEY"], tmp_path / "0.token")
    chain = Chain("base", ("answer-base",), ())
    shown = []
    board = SimpleNamespace(put=SimpleNamespace(remote=lambda name, progress: shown.append((name, progress.stage))))
    launch = params.launch.model_copy(update={"patience": 1})
    outcome = run_on_node(chain, b"no archive: it would not be unpacked", place, needs, launch, board)
    assert set(shown) == {("base", "node not fit")}
    assert re.sub(r"^dvc is \S+", "dvc is X", outcome.error).splitlines() == [
        "dvc is X there and 0.1 here; install constraints.txt",
        "no-such-library is missing there and 2 here; install constraints.txt",
        "PREFSCAN_TEST_KEY is not set; export it where `ray start` runs",
        f"launch.state: {tmp_path} is not the folder of that name on the launching machine; share it",
    ]
    assert outcome.node == os.uname().nodename
    assert not list(place.clones.iterdir())
