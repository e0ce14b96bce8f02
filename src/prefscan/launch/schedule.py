"""The sweep on several processors or machines at once: DVC says what is stale, Ray runs it.

    prefscan launch                   # this machine: `launch.cells` at once; with launch=gpu, a cell a GPU
    prefscan launch --address auto    # a running Ray cluster, whose nodes share a DVC remote
    prefscan launch --dirty           # uncommitted changes go along
    prefscan launch --dirty +experiment=openhermes    # of what `dvc exp run -S …` composes into params.yaml

What cells share runs first, then each cell's chain train → merge → answer → mtbench in a clone of its own, and on one
machine the judge check beside them; at the end this workspace takes all of it over, and `dvc repro` makes the report.
A chain that fails stops no other. Ctrl-C stops everything, with a checkpoint of what is in training, and the same
command goes on. docs/cluster.md has recipes.
"""

import argparse
import hashlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from getpass import getuser
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from prefscan.common.config import Params, check_logging, load
from prefscan.common.errors import UserError
from prefscan.common.paths import SPLITS
from prefscan.launch.clone import BUSY, BUSY_WAIT, NOT_RUN, Chain, Outcome, Place, await_remote, run_supervised
from prefscan.repo.cache import check_cache
from prefscan.repo.config import dvc_command
from prefscan.repo.git import Snapshot, changed_since, snapshot, uncommitted
from prefscan.repo.pipeline import (
    CELL_STAGES,
    compose,
    dvc_settings,
    forget_here,
    lost_stages,
    push_current,
    stale_stages,
    take_over,
)
from prefscan.repo.workspace import check_root

FETCHED = {"fetch-model": ("fetch@model",), "fetch-data": ("fetch@reward", "fetch@pairs", "fetch@questions")}
BASE_STAGES = ("answer-base", "mtbench-base")
FAILED = 1
STOPPED = 130


def plan_chains(params: Params, stale: Iterable[str], remote: bool) -> list[Chain]:
    """The stale stages as chains, in an order in which none stands before what it waits for.

    Every mtbench stage reads the answers of `judge.against`, so that model's answers go before. A judge of this machine
    follows in the chain of each other model. One that is asked over the network has chains of its own, which hold no
    GPU while they wait for it, and whose faults stop no training. The judge check goes beside the cells. It is left to
    the workspace where `agreement` names files, which may be there alone, and where results travel by a `remote`:
    `dvc push` leaves out what git keeps, as the check's metrics. What cells wait for goes before what they do not: the
    judge check waits for the pairs, which it does not read, or it would be ready before the reference. Of the reference
    the held-out pairs go first: of two processors, the one that has the base's answers then has the longer training
    pairs, and the other one the base's judging. All wait for the check: DVC's cache is not made for two that run it.
    """
    stale = set(stale)
    models = {"base": BASE_STAGES} | {
        cell.key: tuple(f"{stage}@{cell.key}" for stage in CELL_STAGES) for cell in params.grid.cells
    }
    first, asked = params.judge.against, params.judge.kind == "openai"
    found: list[Chain] = []

    def add(name: str, stages: Iterable[str], after: Iterable[str] = (), *, computes: bool = True) -> None:
        there = {chain.name for chain in found}
        if name not in there and (targets := tuple(stage for stage in stages if stage in stale)):
            waits_for = tuple(other for other in ("check", *after) if other in there)
            found.append(Chain(name, targets, waits_for, computes))

    add("check", ["check"], computes=False)
    for name, stages in FETCHED.items():
        add(name, stages, computes=False)
    add("reward", [f"reward@{kind}" for kind in params.stages.reward], FETCHED)
    samples = [f"sample-{split}" for split in params.stages.sample]
    for of in params.stages.sample:
        add(f"sample-{of}", [f"sample@{of}"], (*FETCHED, "reward"))
    add("prepare", ["prepare"], (*FETCHED, "sample-train"), computes=False)
    prepared = (*FETCHED, "prepare")
    for key in (first, *(key for key in models if key != first)):
        shared = [*(FETCHED if key == "base" else (*prepared, *samples))]
        if key != "base":
            for split in reversed(SPLITS):
                add(f"reference-{split}", [f"reference@{split}"], prepared)
                shared.append(f"reference-{split}")
            if not (params.agreement or remote):
                add("judge-check", ["judge-check"], prepared, computes=not asked)
        if asked or key == first:
            add(key, models[key][:-1], shared)
            add(f"judge-{key}", models[key][-1:], dict.fromkeys((key, first)), computes=not asked)
        else:
            add(key, models[key], [*shared, first])
    return found


def settle_place(params: Params, on_cluster: bool) -> Place:
    """Where clones, cache and unfinished work are; raises UserError where a cluster's nodes could not share them."""
    cache, local, remote = dvc_settings()
    here, launch = Path.cwd(), params.launch
    if not on_cluster:
        scratch = Path(launch.scratch).absolute() if launch.scratch else here / ".prefscan/launch"
        state = Path(launch.state).absolute() if launch.state else here
        return Place(scratch / "clones", cache, state, remote=None, marker=None, local=local)
    if remote is None:
        raise UserError(
            "--address: results travel between machines by a DVC remote, and the repository has no default one; "
            "`dvc remote add --default NAME URL`"
        )
    if launch.state is None and params.judge.kind == "openai":
        raise UserError(
            "launch.state: null, and each node would pay the judge anew and keep a budget of its own; name a folder "
            "that all nodes see"
        )
    # Of this workspace alone: two launches must not take each other's cells for their own.
    own = f"prefscan-launch-{getuser()}-{hashlib.sha256(str(here).encode()).hexdigest()[:8]}"
    scratch = Path(launch.scratch).absolute() if launch.scratch else Path(tempfile.gettempdir(), own)
    state = Path(launch.state).absolute() if launch.state else scratch
    return Place(scratch / "clones", scratch / "cache", state, remote, marker_of(remote), local)


def marker_of(remote: dict[str, Any]) -> Path | None:
    """A new file in a remote that is a folder, by which the nodes know it; None for other kinds of remotes."""
    if "://" in remote["url"]:
        return None
    marker = Path(remote["url"]) / "prefscan-launch"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return marker


def refuse_shared_gpus(chains: list[Chain], params: Params) -> None:
    """Raises UserError where training would start more processes than it gets GPUs: both would take the first."""
    processes = params.train.accelerate.num_processes if params.train.accelerate else 1
    trains = any(target.startswith("train@") for chain in chains for target in chain.targets)
    if trains and 0 < params.launch.num_gpus < processes:
        raise UserError(
            f"launch.num_gpus: a cell would get {params.launch.num_gpus:g}, and train.accelerate starts {processes} "
            f"processes with a GPU each; set it to {processes}, or choose train/accelerate=none"
        )


def run_chains(
    chains: list[Chain], params: Params, place: Place, address: str | None, taken: Snapshot
) -> list[Outcome]:
    """How each chain ended, on the cluster at the address or on a Ray of this machine's own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # this software is often used offline
    if address is None:
        # Or Ray would take 127.0.0.1 for the machine's own address and listen on all of its networks.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "RAY_AUTH_MODE" not in os.environ:  # as Ray does, but without a file in HOME and a warning
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from prefscan.launch import runner as cluster  # Ray reads these variables when it is imported

    with cluster.connected(params, address), cluster.needed(place, params) as needs:
        signal.signal(signal.SIGTERM, interrupted)  # Ray has put its own in place
        cluster.check_nodes(place, needs)
        return cluster.run_all(chains, params, place, needs, taken)


def restore(made: list[str], targets: list[str], place: Place, patience: float) -> int:
    """Take over the stages that were made, and `dvc repro` the targets, or all; waits for another that runs here.

    Raises UserError where the remote is gone: DVC would run here again what has run elsewhere.
    """
    if gone := await_remote(place, patience):
        raise UserError(f"{gone}, and run `dvc repro --pull`")
    if made:
        with suppress(UserError):  # the `dvc repro` that follows says what it was
            take_over(made, pull=place.remote is not None)
    pull = ["--pull"] if place.remote else []
    log = Path(".prefscan/launch/workspace.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    while True:
        code, output = run_supervised(
            dvc_command("--wait-for-lock", "repro", *pull, *targets),
            Path(),
            dict(os.environ),
            log,
            lambda line: print(line, end="", flush=True),
        )
        if code == 0 or not BUSY.search(output):
            return code
        time.sleep(BUSY_WAIT)


def report_failures(outcomes: list[Outcome]) -> None:
    """The last lines of what failed, once where several failed alike, and the names of what therefore did not run."""
    failures: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.error and outcome.error != NOT_RUN:
            failures.setdefault((outcome.node, outcome.error), []).append(outcome.name)
    for (node, error), names in failures.items():
        print(f"\n{', '.join(names)} failed{f' on {node}' if node else ''}:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in error.splitlines()), file=sys.stderr)
    if skipped := [outcome.name for outcome in outcomes if outcome.error == NOT_RUN]:
        print(f"\nNot run, since what they need failed: {', '.join(skipped)}", file=sys.stderr)


def launch_sweep(address: str | None, dirty: bool) -> int:
    """Exit status of a launch; raises UserError where it cannot begin."""
    params = load()
    if not dirty and (changes := uncommitted()):
        listed = ", ".join(changes[:10]) + (f" and {len(changes) - 10} more" if len(changes) > 10 else "")
        raise UserError(f"not committed: {listed}; commit, or take the changes along with --dirty")
    on_cluster = address is not None
    place = settle_place(params, on_cluster)
    stale = stale_stages(missing_data_is_stale=True)
    chains = plan_chains(params, stale, remote=on_cluster)
    refuse_shared_gpus(chains, params)
    if chains and not on_cluster and check_cache()[1]:  # on a cluster, each node checks its own
        stale = stale_stages(missing_data_is_stale=True)
        chains = plan_chains(params, stale, remote=on_cluster)
    if chains and on_cluster:
        push_current(stale)
    lost = lost_stages({stage for chain in chains for stage in chain.targets}, remote=on_cluster) if chains else set()
    taken = snapshot(lost)
    outcomes = run_chains(chains, params, place, address, taken) if chains else []
    ended = {outcome.name for outcome in outcomes if not outcome.error}
    made = [target for chain in chains if chain.name in ended for target in chain.targets]
    forget_here(lost.intersection(made))
    try:
        if changes := changed_since(taken):
            raise UserError(
                f"changed during the launch: {', '.join(changes[:10])}; what has run is kept, launch again, or undo "
                "the change and run `dvc repro`"
            )
        if len(ended) == len(chains):
            return restore(made, [], place, params.launch.patience)
        if made:
            restore(made, made, place, params.launch.patience)
        return FAILED
    finally:
        report_failures(outcomes)  # below what DVC prints, and whatever else went wrong


def interrupted(*_: int | FrameType | None) -> None:
    raise KeyboardInterrupt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as `dvc exp run -S` takes them")
    parser.add_argument("--address", help="of a running Ray cluster, or auto; without it, a Ray of this machine's own")
    parser.add_argument("--dirty", action="store_true", help="take uncommitted changes along")


def main(overrides: list[str], address: str | None, dirty: bool) -> None:
    check_root()
    signal.signal(signal.SIGTERM, interrupted)
    Path(".prefscan").mkdir(exist_ok=True)
    try:
        with FileLock(".prefscan/launch.lock", timeout=0):
            if overrides:
                with tempfile.TemporaryDirectory() as folder:  # what is wrong replaces nothing
                    composed = Path(folder) / "params.yaml"
                    params = compose(overrides, composed)
                    if address is None:  # a cluster's nodes may have what this machine lacks
                        check_logging(params.runtime.report_to)
                    shutil.copyfile(composed, "params.yaml")
            code = launch_sweep(address, dirty)
    except Timeout:
        raise UserError("another launch runs in this workspace; wait for it, or end it") from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = STOPPED
    sys.exit(code)
