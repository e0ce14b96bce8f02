"""The launcher on cells that sleep: real DVC, a real Ray on this machine, real processes and signals."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from omegaconf import OmegaConf

from configuration import composed
from launch import make_sleeping
from mtbench_data import openai_judge
from prefscan.common import config
from prefscan.common.config import Accelerate, Agreement, OpenAIJudge, Params
from prefscan.common.errors import UserError
from prefscan.launch import schedule as launch_stage
from prefscan.launch.clone import NOT_RUN, Chain, Outcome
from prefscan.launch.schedule import FAILED, STOPPED, plan_chains, refuse_shared_gpus, report_failures
from prefscan.repo.pipeline import CELL_STAGES

ROOT = Path(__file__).parents[2]
CELLS = ("sigmoid-0.1-24", "sigmoid-0.11-24", "sigmoid-0.12-24")
REFERENCES = ("reference@train", "reference@heldout")
OF_REFERENCE = ("reference-heldout", "reference-train")  # their chains


def of_cell(key: str) -> tuple[str, ...]:
    return tuple(f"{stage}@{key}" for stage in CELL_STAGES)


class Launched:
    """A launch in a folder, its output in a file."""

    def __init__(self, folder: Path, *arguments: str, background: bool = False) -> None:
        self.output = folder.parent / f"{folder.name}-{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefscan", "launch", *arguments],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # As a script's shell does with what it starts by `&`.
                preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
            )

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        return self.process.wait(seconds), self.output.read_text()


def launch(folder: Path, *arguments: str) -> tuple[int, str]:
    return Launched(folder, *arguments).wait()


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)


def lock_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "dvc.lock").read_text())["stages"])


def log(folder: Path, chain: str) -> str:
    path = folder / f".prefscan/launch/{chain}.log"
    return path.read_text() if path.exists() else ""


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes that work in a clone of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder / ".prefscan") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))


@pytest.fixture(scope="module")
def known_reward() -> Params:
    """What conf/ composes by itself: losses compared by a known reward."""
    return Params.model_validate(OmegaConf.to_container(composed(), resolve=True))


def test_only_stale_chains_are_planned_in_an_order_that_ray_can_take(params: Params) -> None:
    keys = [cell.key for cell in params.grid.cells]
    everything = ["check", "fetch@model", "fetch@pairs", "fetch@questions", "prepare", *REFERENCES, "answer-base"]
    everything += ["mtbench-base", "judge-check", "report", *(stage for key in keys for stage in of_cell(key))]
    chains = plan_chains(params, everything, remote=False)
    fetched = ("fetch-model", "fetch-data")
    inputs = ("check", *fetched)
    names = [*inputs, "prepare", "base", "judge-base", *OF_REFERENCE, "judge-check", *keys]
    assert [chain.name for chain in chains] == names
    after = {chain.name: chain.after for chain in chains}
    assert [name for name in names if not after[name]] == ["check"]
    assert {after[name] for name in fetched} == {("check",)}
    assert after["prepare"] == after["base"] == inputs
    assert {after[name] for name in (*OF_REFERENCE, "judge-check")} == {(*inputs, "prepare")}
    assert after["judge-base"] == ("check", "base")
    assert all(after[key] == (*inputs, "prepare", *OF_REFERENCE, "base") for key in keys)
    assert chains[-1].targets == of_cell(keys[-1])
    assert [chain.name for chain in chains if not chain.computes] == [*inputs, "prepare"]
    # The report is made where the launch began, at its end.
    assert {t for chain in chains for t in chain.targets} == {*everything} - {"report"}
    only = plan_chains(params, ["mtbench-base", "answer@" + keys[1], "mtbench@" + keys[1], "report"], False)
    assert only == [
        Chain("judge-base", ("mtbench-base",)),
        Chain(keys[1], ("answer@" + keys[1], "mtbench@" + keys[1])),
    ]
    assert plan_chains(params, ["report"], remote=False) == []
    # What is there is not waited for; the check alone is stale where a parameter has changed.
    judged = ["check", "mtbench-base", "judge-check", f"mtbench@{keys[0]}"]
    assert plan_chains(params, judged, remote=False) == [
        Chain("check", ("check",), computes=False),
        Chain("judge-base", ("mtbench-base",), ("check",)),
        Chain("judge-check", ("judge-check",), ("check",)),
        Chain(keys[0], (f"mtbench@{keys[0]}",), ("check",)),
    ]
    assert plan_chains(params, ["fetch@pairs", "prepare", "answer-base"], remote=False) == [
        Chain("fetch-data", ("fetch@pairs",), computes=False),
        Chain("prepare", ("prepare",), ("fetch-data",), computes=False),
        Chain("base", ("answer-base",), ("fetch-data",)),
    ]


def test_the_reward_and_its_samples_go_before_the_pairs_made_of_them(known_reward: Params) -> None:
    keys = [cell.key for cell in known_reward.grid.cells]
    asked = [cell.key for cell in known_reward.stages.mtbench.cells]
    assert asked != keys  # MT-Bench is of fewer cells
    samples = ["sample@train", "sample@eval"]
    everything = ["check", "fetch@model", "fetch@reward", "fetch@questions", "reward@sentiment", *samples, "prepare"]
    everything += [*REFERENCES, "answer-base", "mtbench-base", "judge-check", "report"]
    cells = {
        key: tuple(stage for stage in of_cell(key) if key in asked or not stage.startswith(("answer", "mtbench")))
        for key in keys
    }
    everything += [stage for stages in cells.values() for stage in stages]
    chains = plan_chains(known_reward, everything, remote=False)
    inputs = ("check", "fetch-model", "fetch-data")
    before = (*inputs, "reward", "sample-train", "sample-eval", "prepare")
    names = [chain.name for chain in chains]
    assert names == [*(*before, "base", "judge-base", *OF_REFERENCE, "judge-check", *keys)]
    after = {chain.name: chain.after for chain in chains}
    assert after["reward"] == inputs
    assert after["sample-train"] == after["sample-eval"] == (*inputs, "reward")
    assert after["prepare"] == (*inputs, "sample-train")
    made = (*inputs, "sample-train", "sample-eval", "prepare")
    assert {after[name] for name in OF_REFERENCE} == {made}
    assert all(after[key] == (*made, *OF_REFERENCE, "base") for key in keys)
    assert {chain.name: chain.targets for chain in chains if chain.name in keys} == cells
    for chain in chains:
        assert set(chain.after) <= set(names[: names.index(chain.name)])
    assert [chain.name for chain in chains if not chain.computes] == [*inputs, "prepare"]
    assert {target for chain in chains for target in chain.targets} == {*everything} - {"report"}


def test_a_stale_evaluation_waits_for_nothing_that_is_there(known_reward: Params) -> None:
    key = known_reward.grid.cells[0].key
    assert plan_chains(known_reward, [f"evaluate@{key}", "report"], remote=False) == [Chain(key, (f"evaluate@{key}",))]
    stale = ["sample@eval", f"evaluate@{key}", "report"]
    assert plan_chains(known_reward, stale, remote=False) == [
        Chain("sample-eval", ("sample@eval",)),
        Chain(key, (f"evaluate@{key}",), ("sample-eval",)),
    ]


def test_a_judge_check_that_no_clone_could_make_or_hand_over_is_left_to_the_workspace(params: Params) -> None:
    """Its files may be in the workspace alone, and no remote gets its result."""
    stale = ["judge-check", "mtbench-base", "report"]
    agreement = Agreement(judgements="people.jsonl", answers="answers.jsonl")
    compared = params.model_copy(update={"agreement": agreement})
    base = Chain("judge-base", ("mtbench-base",))
    assert plan_chains(params, stale, remote=False) == [base, Chain("judge-check", ("judge-check",))]
    assert plan_chains(compared, stale, remote=False) == plan_chains(params, stale, remote=True) == [base]


def test_the_model_that_the_others_are_judged_against_goes_first(params: Params) -> None:
    keys = [cell.key for cell in params.grid.cells]
    paired = params.model_copy(update={"judge": params.judge.model_copy(update={"against": keys[2]})})
    chains = plan_chains(
        paired, [*REFERENCES, "answer-base", "mtbench-base", *(s for key in keys for s in of_cell(key))], remote=False
    )
    assert [chain.name for chain in chains][:5] == [*OF_REFERENCE, keys[2], f"judge-{keys[2]}", "base"]
    assert [chain.after for chain in chains][2:5] == [OF_REFERENCE, (keys[2],), (keys[2],)]
    assert {chain.after for chain in chains[5:]} == {(*OF_REFERENCE, keys[2])}


def test_a_judge_that_is_asked_over_the_network_has_chains_of_its_own(params: Params) -> None:
    """No training waits for it, and no GPU is held for it."""
    keys = [cell.key for cell in params.grid.cells]
    judge = OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1"))
    asked = params.model_copy(update={"judge": judge})
    stale = [*REFERENCES, "answer-base", "mtbench-base", "judge-check", *(s for key in keys for s in of_cell(key))]
    chains = {chain.name: chain for chain in plan_chains(asked, stale, remote=False)}
    assert {name for name, chain in chains.items() if not chain.computes} == {
        *(f"judge-{name}" for name in ("base", "check", *keys))
    }
    for key in keys:
        assert chains[key] == Chain(key, of_cell(key)[:-1], OF_REFERENCE)
        assert chains[f"judge-{key}"] == Chain(f"judge-{key}", (f"mtbench@{key}",), (key, "base"), computes=False)
    assert chains["judge-base"].after == ("base",)


def test_processes_without_a_gpu_of_their_own_are_refused(params: Params) -> None:
    accelerate = Accelerate(distributed_type="MULTI_GPU", num_processes=2, num_machines=1)
    section = params.train.model_copy(update={"accelerate": accelerate})

    def launched_with(gpus: float) -> Params:
        launch = params.launch.model_copy(update={"num_gpus": gpus})
        return params.model_copy(update={"train": section, "launch": launch})

    train, judge = (Chain("cell", (f"{stage}@sigmoid-0.1-8",)) for stage in ("train", "mtbench"))
    with pytest.raises(UserError, match=r"^launch\.num_gpus: a cell would get 1, .* 2 processes .*; set it to 2, or"):
        refuse_shared_gpus([train], launched_with(1.0))
    for gpus in (0.0, 2.0):
        refuse_shared_gpus([train], launched_with(gpus))
    refuse_shared_gpus([judge], launched_with(1.0))


def test_what_failed_alike_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """As cells may that cannot reach one server."""
    refused = "prefscan: no loss\nERROR: check"
    errors = [("a", refused), ("b", ""), ("c", refused), ("d", "another"), ("e", NOT_RUN), ("f", NOT_RUN)]
    report_failures([Outcome(name, 1.0, "" if error == NOT_RUN else "here", error=error) for name, error in errors])
    assert capsys.readouterr().err == (
        "\na, c failed on here:\n  prefscan: no loss\n  ERROR: check\n\nd failed on here:\n  another\n"
        "\nNot run, since what they need failed: e, f\n"
    )


def test_why_a_chain_failed_is_said_where_the_workspace_has_changed_meanwhile(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sleeping(in_tmp / "work", 1, 0)
    monkeypatch.chdir(in_tmp / "work")

    def failing(chains: list[Chain], *_: Any) -> list[Outcome]:
        Path("conf/start.txt").write_text("edited\n")
        return [Outcome(chain.name, 1.0, "here", error="a fault") for chain in chains]

    monkeypatch.setattr(launch_stage, "run_chains", failing)
    with pytest.raises(UserError, match=r"^changed during the launch: conf/start\.txt; what has run is kept"):
        launch_stage.launch_sweep(None, dirty=False)
    assert "judge-check, sigmoid-0.1-24 failed on here:\n  a fault\n" in capsys.readouterr().err


def test_importing_it_loads_no_torch() -> None:
    """The launcher, and each of Ray's workers that holds a chain, would take two seconds longer to begin."""
    script = "import sys, prefscan.launch.runner, prefscan.launch.schedule; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def make_logging(folder: Path, seconds: float, cells: int = len(CELLS)) -> Path:
    """Cells, two at once, whose stages write their names to ran.txt; a cell that fault.txt names fails."""
    make_sleeping(folder, cells, seconds, cells=2)
    ran, fault = folder.parent / "ran.txt", folder.parent / "fault.txt"
    fault.touch()
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text())
    for stage in CELL_STAGES:
        logs = f"echo {stage}@${{key}} >> {ran}; "
        faulty = f"if grep -qx -e ${{key}} {fault}; then echo 'prefscan: a fault'; exit 1; fi; "
        body = pipeline["stages"][stage]
        body["cmd"] = logs + (faulty if stage == "train" else "") + body["cmd"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return folder


def ran(folder: Path) -> list[str]:
    """The stages of cells that have run, and empties the list."""
    path = folder.parent / "ran.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(names)


def damage(folder: Path, out: str) -> Path:
    """Change a byte of an output's object in the cache; its length, time and rights stay. Returns the object."""
    (digest,) = [o["md5"] for stage in lock_of(folder).values() for o in stage.get("outs", []) if o["path"] == out]
    found = folder / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"
    before, content = found.stat(), found.read_bytes()
    found.chmod(0o644)
    found.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(found, ns=(before.st_atime_ns, before.st_mtime_ns))
    found.chmod(before.st_mode)
    return found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss=dpo", "loss=dpo: grid.loss: 'dpo' is no known loss"),
        ("runtime.report_to=wandb", "params.yaml: runtime.report_to: wandb is not installed"),
    ],
)
def test_parameters_that_a_stage_would_refuse_replace_nothing(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    shutil.copytree(ROOT / "conf", in_tmp / "conf")
    (in_tmp / "params.yaml").write_text("as it was")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=said):
            launch_stage.main([override], address=None, dirty=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (in_tmp / "params.yaml").read_text() == "as it was"


def test_a_cell_that_fails_stops_no_other_and_is_all_that_runs_next(tmp_path: Path) -> None:
    """And so is what made an object of the cache that has been damaged meanwhile."""
    work = make_logging(tmp_path / "work", 0, cells=2)
    code, output = launch(work)
    assert code == 1
    assert "not committed: dvc.yaml; commit, or take the changes along with --dirty" in output
    assert not (work / "dvc.lock").exists()

    (tmp_path / "fault.txt").write_text(f"{CELLS[0]}\n")
    code, output = launch(work, "--dirty")
    assert code == FAILED, output
    assert re.search(rf"{CELLS[0]} failed on \S+:\n(.*\n)*  prefscan: a fault\n", output)
    assert "Traceback" not in output
    assert ran(work) == sorted([f"train@{CELLS[0]}", *of_cell(CELLS[1])])
    assert {*of_cell(CELLS[1]), *REFERENCES, "mtbench-base", "judge-check"} <= set(lock_of(work))
    # What git keeps and DVC's cache does not is taken over as well.
    assert "Running stage 'judge-check'" in log(work, "judge-check")
    assert "Running stage 'judge-check'" not in output
    assert (work / "metrics/judge.txt").exists()
    assert not {*of_cell(CELLS[0]), "report"} & set(lock_of(work))

    (tmp_path / "fault.txt").write_text("")
    damaged = damage(work, f"models/adapters/{CELLS[1]}.txt")
    code, output = launch(work, "--dirty")
    assert code == 0, output
    assert f"removed {damaged}: its content has another hash" in output
    assert ran(work) == sorted([*of_cell(CELLS[0]), f"train@{CELLS[1]}"])
    assert damaged.exists()
    assert (work / "report.txt").exists()
    assert dvc(work, "status").stdout.strip() == "Data and pipelines are up to date."

    # What the launch took over, and wrote into dvc.lock at once, is what `dvc repro` takes over stage by stage.
    assert output.count("Updating lock file") == len(("the chains' stages", "report"))
    taken = lock_of(work)
    (work / "dvc.lock").unlink()
    again = dvc(work, "repro")
    assert again.stdout.count("is cached - skipping run") == len(taken), again.stdout + again.stderr
    assert (lock_of(work), ran(work)) == (taken, [])


@pytest.mark.slow  # the plan of its chains is tested above
def test_a_judge_over_the_network_that_fails_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    work = make_logging(tmp_path / "work", 0, cells=2)
    params = yaml.safe_load((work / "params.yaml").read_text()) | {"judge": openai_judge("http://127.0.0.1:9/v1")}
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    pipeline = yaml.safe_load((work / "dvc.yaml").read_text())
    stages, fault = pipeline["stages"], tmp_path / "fault.txt"
    for stage, name in (("mtbench-base", "base"), ("mtbench", "${key}-judge")):
        stages[stage]["cmd"] = f"if grep -qx -e {name} {fault}; then exit 1; fi; {stages[stage]['cmd']}"
    (work / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    fault.write_text(f"base\n{CELLS[1]}-judge\n")
    code, output = launch(work, "--dirty")
    assert code == FAILED, output
    assert re.findall(r"^(\S+) failed on", output, re.MULTILINE) == ["judge-base", f"judge-{CELLS[1]}"]
    every = {stage for key in CELLS[:2] for stage in of_cell(key)}
    assert ran(work) == sorted(every - {f"mtbench@{CELLS[1]}"})
    assert {*every, "answer-base", "mtbench-base"} - set(lock_of(work)) == {"mtbench-base", f"mtbench@{CELLS[1]}"}


def test_where_bits_differ_from_those_in_dvc_lock_each_stage_runs_once(tmp_path: Path) -> None:
    """As in a clone of this repository on another processor: dvc.lock has outputs that no cache has."""
    work, processor = make_logging(tmp_path / "work", 0, cells=1), tmp_path / "processor.txt"
    pipeline = yaml.safe_load((work / "dvc.yaml").read_text())
    stages = pipeline["stages"]
    for stage, name in (("reference", "reference@${item}"), ("answer-base", "answer-base")):
        body = stages[stage].get("do", stages[stage])
        body["cmd"] = f"echo {name} >> {tmp_path}/ran.txt; {body['cmd']}"
    for stage in ("reference", "answer-base", "train"):
        body = stages[stage].get("do", stages[stage])
        body["cmd"] += f" && cat {processor} >> {body['outs'][0]}"
    (work / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    processor.write_text("one\n")
    assert dvc(work, "repro").returncode == 0
    every = sorted([*REFERENCES, "answer-base", *of_cell(CELLS[0])])
    assert ran(work) == every
    first = lock_of(work)

    for name in (".dvc/cache", ".dvc/tmp", "data", "models"):
        shutil.rmtree(work / name)
    processor.write_text("two\n")
    code, output = launch(work, "--dirty")
    assert code == 0, output
    assert ran(work) == every
    again = lock_of(work)
    assert again.keys() == first.keys()
    assert again[REFERENCES[0]]["outs"] != first[REFERENCES[0]]["outs"]
    assert dvc(work, "status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.slow
def test_stopped_and_killed_launches_leave_nothing_running_and_the_next_goes_on(tmp_path: Path) -> None:
    """Ctrl-C, kill -9 of the launching process, a second launch beside the first, and the user's own `dvc repro`."""
    work = make_logging(tmp_path / "work", 15)
    begun = [f"Running stage 'train@{key}'" for key in CELLS]
    for background, stop in (
        (False, lambda pid: os.killpg(pid, signal.SIGINT)),  # a terminal's Ctrl-C goes to the whole group
        (True, lambda pid: os.kill(pid, signal.SIGTERM)),
    ):
        stopped = Launched(work, "--dirty", background=background)
        wait_for(lambda: begun[0] in log(work, CELLS[0]) and begun[1] in log(work, CELLS[1]))
        stop(stopped.process.pid)
        code, output = stopped.wait(60)  # not when Ray's workers are killed, GRACE seconds later
        assert code == STOPPED, output
        assert output.endswith("stopped; the same command goes on\n")
        assert not left_behind(work)
        assert ran(work) == [f"train@{key}" for key in CELLS[:2]]
        for key in CELLS:
            Path(work, f".prefscan/launch/{key}.log").unlink(missing_ok=True)

    second = Launched(work, "--dirty")
    wait_for(lambda: f"Running stage 'answer@{CELLS[0]}'" in log(work, CELLS[0]))
    second.process.kill()
    second.wait()
    wait_for(lambda: not left_behind(work))

    third = Launched(work, "--dirty")
    wait_for(lambda: "Running stage" in log(work, CELLS[2]))
    code, output = launch(work, "--dirty")
    assert (code, "another launch runs in this workspace" in output) == (1, True)
    own = dvc(work, "repro", f"train@{CELLS[1]}")
    assert own.returncode == 0, own.stderr
    code, output = third.wait()
    assert code == 0, output
    # The stages that the second launch had finished did not run again.
    assert ran(work).count(f"train@{CELLS[0]}") == 1
    assert dvc(work, "status").stdout.strip() == "Data and pipelines are up to date."
    assert not left_behind(work)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_cells_finish_with_flat_memory_and_no_handle_left_open(tmp_path: Path) -> None:
    """Of the launching process and of Ray's, between a quarter of the cells and the last; about half an hour."""
    cells = 200
    work = make_sleeping(tmp_path / "work", cells, 0, cells=2)
    launched = Launched(work)
    launching = psutil.Process(launched.process.pid)
    measured: list[tuple[int, int, int]] = []  # cells done, bytes, open files

    def measure() -> None:
        done = launched.output.read_text().count(": done in")
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [launching, *(p for p in launching.children(recursive=True) if "ray" in p.name())]
            sizes = [(p.memory_info().rss, p.num_fds()) for p in processes]
            measured.append((done, sum(rss for rss, _ in sizes), sum(files for _, files in sizes)))

    while launched.process.poll() is None:
        measure()
        time.sleep(5)
    code, output = launched.wait()
    assert code == 0, output
    assert dvc(work, "status").stdout.strip() == "Data and pipelines are up to date."
    assert len([name for name in lock_of(work) if name.startswith("mtbench@")]) == cells
    assert not list((work / ".prefscan/launch/clones").iterdir())
    early = [row for row in measured if cells * 0.2 < row[0] < cells * 0.3]
    late = [row for row in measured if cells * 0.9 < row[0] < cells]
    for kind, slack in ((1, 100 * 2**20), (2, 40)):
        assert max(row[kind] for row in late) < max(row[kind] for row in early) + slack, (kind, early, late)
