"""The sweep on several processors or machines at once: DVC says what is stale, Ray runs it.

    python -m prefscan.launch                   # this machine: as many cells at once as GPUs, or `launch.cells` on CPUs
    python -m prefscan.launch --address auto    # a running Ray cluster, whose nodes share a DVC remote
    python -m prefscan.launch --dirty           # uncommitted changes go along

What cells share runs first, then each cell's chain train → merge → answer → mtbench in a clone of its own; at the end
`dvc repro` in this workspace restores all of it and makes the report. A chain that fails stops no other. Ctrl-C stops
everything, with a checkpoint of what is in training, and the same command goes on. docs/cluster.md has recipes.
"""

import argparse
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from getpass import getuser
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from prefscan.cache import remove_damaged
from prefscan.clones import (
    BUSY,
    BUSY_WAIT,
    Chain,
    Outcome,
    Place,
    Progress,
    cache_and_remote,
    run_chain,
    run_leashed,
    snapshot,
    uncommitted,
)
from prefscan.errors import UserError, run_stage
from prefscan.leash import GRACE
from prefscan.params import Params, load
from prefscan.pipeline import CELL_STAGES, stale_stages

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError:
    sys.exit("prefscan: launch needs Ray; install it: pip install -c constraints.txt '.[cluster]'")

INPUTS = ("check", "fetch@model", "fetch@pairs", "fetch@questions", "prepare")
BASE_STAGES = ("answer-base", "mtbench-base")
LIBRARIES = ("bitsandbytes", "dvc", "peft", "ray", "torch", "transformers", "trl")  # the same on every node
SLOW = ".*timed out during startup"  # Ray gives its processes 30 s, which a busy machine may exceed
NOT_RUN = "not run"
FAILED = 1
STOPPED = 130


@dataclass(frozen=True)
class Work:
    """A chain and the names of those that must have ended well before it begins."""

    chain: Chain
    after: tuple[str, ...]


def plan_work(params: Params, stale: Iterable[str]) -> list[Work]:
    """The stale stages as chains, in an order in which none stands before what it waits for.

    Every mtbench stage reads the answers of `judge.against`, so that model's chain goes before all others.
    """
    stale = set(stale)
    models = {"base": BASE_STAGES} | {
        cell.key: tuple(f"{stage}@{cell.key}" for stage in CELL_STAGES) for cell in params.grid.cells
    }
    first = params.judge.against
    stages = {"inputs": INPUTS, "reference": ("reference",), first: models.pop(first), **models}
    after = {"inputs": [], "reference": ["inputs"], first: ["inputs"] if first == "base" else ["inputs", "reference"]}
    found: list[Work] = []
    for name, names in stages.items():
        targets = tuple(stage for stage in names if stage in stale)
        if targets:
            there = {work.chain.name for work in found}
            waits = after.get(name, ["inputs", "reference", first])
            found.append(Work(Chain(name, targets), tuple(other for other in waits if other in there)))
    return found


class Board:
    """A Ray actor that knows what each running chain is doing, for the display."""

    def __init__(self) -> None:
        self.progress: dict[str, Progress] = {}

    def put(self, name: str, progress: Progress) -> None:
        self.progress[name] = progress

    def get(self) -> dict[str, Progress]:
        return self.progress


def run_on_node(
    chain: Chain, archive: bytes, place: Place, attempts: int, patience: float, board: Any, *before: Outcome
) -> Outcome:
    """A Ray task: the chain, unless one that it waits for has failed."""
    if any(outcome.error for outcome in before):
        return Outcome(chain.name, 0.0, "", error=NOT_RUN)
    return run_chain(chain, archive, place, attempts, patience, lambda progress: board.put.remote(chain.name, progress))


def check_node(place: Place, variables: list[str], versions: dict[str, str]) -> list[str]:
    """A Ray task: why the node cannot work, in sentences. Removes what is damaged from its cache, to be made again."""
    complaints = [
        f"{name} is {own} there and {version} here; install constraints.txt"
        for name, version in versions.items()
        if (own := _version(name)) != version
    ]
    complaints += [
        f"{name} is not set; export it where `ray start` runs" for name in variables if not os.environ.get(name)
    ]
    for folder in (place.clones, place.cache, place.state):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            complaints.append(f"{folder} cannot be written ({error.strerror}); set launch.scratch or launch.state")
    if not complaints:
        remove_damaged(place.cache / "files/md5")
    return complaints


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def key_variables(params: Params) -> list[str]:
    """The environment variables with keys that the stages of these parameters read."""
    server = params.answer.server
    named = [getattr(params.judge, "key_variable", None), server.key_variable if server else None]
    return sorted({name for name in named if name})


def settle_place(params: Params, on_cluster: bool) -> Place:
    """Where clones, cache and unfinished work are; raises UserError for a cluster without a DVC remote."""
    cache, remote = cache_and_remote()
    if on_cluster and remote is None:
        raise UserError(
            "--address: results travel between machines by a DVC remote, and the repository has no default one; "
            "`dvc remote add --default NAME URL`"
        )
    here = Path.cwd()
    launch = params.launch
    home = Path(tempfile.gettempdir(), f"prefscan-launch-{getuser()}") if on_cluster else here / ".prefscan/launch"
    scratch = Path(launch.scratch).absolute() if launch.scratch else home
    return Place(
        clones=scratch / "clones",
        cache=scratch / "cache" if on_cluster else cache,
        state=Path(launch.state).absolute() if launch.state else (scratch if on_cluster else here),
        remote=remote,
        push=on_cluster,
        threads=os.environ.get("OMP_NUM_THREADS"),
    )


def start_ray(params: Params, address: str | None) -> None:
    """Connect to a cluster, or start one on this machine with room for `launch.cells`, or for a cell on each GPU.

    Raises UserError where there is no cluster, and where no node could ever hold a cell.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # this software is often used offline
    launch = params.launch
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--address {address}: no Ray cluster answers there ({error}); `ray start` one") from None
    else:
        for attempt in Retrying(stop=stop_after_attempt(3), retry=retry_if_exception_message(match=SLOW), reraise=True):
            with attempt:
                ray.init(
                    address="local",
                    # Without GPUs, Ray's CPUs are what limits the cells at once; with them, the GPUs do.
                    num_cpus=None if launch.num_gpus else ceil(launch.cells * launch.num_cpus),
                    num_gpus=None if launch.num_gpus else 0,
                    object_store_memory=256 * 2**20,  # for the snapshot; a container's /dev/shm may be small
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
    for resource, needed in (("CPU", launch.num_cpus), ("GPU", launch.num_gpus)):
        most = max(node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"])
        if most < needed:
            raise UserError(
                f"launch.num_{resource.lower()}s: {needed:g}, and no node has more than {most:g} for Ray; set it "
                "lower, or choose launch=laptop"
            )


def room(params: Params) -> int:
    """How many cells the cluster holds at once."""
    launch, total = params.launch, 0.0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            fits = [have.get("CPU", 0) // launch.num_cpus]
            if launch.num_gpus:
                fits.append(have.get("GPU", 0) // launch.num_gpus)
            total += min(fits)
    return max(int(total), 1)


def check_nodes(place: Place, params: Params) -> None:
    """Raises UserError with what each node lacks; looks at all nodes at once."""
    task = ray.remote(num_cpus=0)(check_node)
    versions = {name: _version(name) for name in LIBRARIES}
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    checks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            place, key_variables(params), versions
        )
        for node in nodes
    ]
    complaints = [
        f"{address}: {complaint}"
        for address, found in zip(nodes.values(), ray.get(checks), strict=True)
        for complaint in found
    ]
    if complaints:
        raise UserError("; ".join(complaints))


@dataclass
class Display:
    """What is shown while chains run: a table on a terminal, a line for each chain that ends elsewhere."""

    work: list[Work]
    workers: int
    usd_per_hour: float | None
    console: Console = field(default_factory=Console)
    began: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)

    def update(self, progress: dict[str, Progress]) -> None:
        self.progress = progress
        for name in progress:
            self.began.setdefault(name, time.monotonic())

    def ended(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        if not self.console.is_terminal:
            how = f"failed: {outcome.error.splitlines()[-1]}" if outcome.error else f"done in {outcome.seconds:.0f} s"
            self.console.print(
                f"{outcome.name}: {how} ({len(self.outcomes)} of {len(self.work)})", highlight=False, soft_wrap=True
            )

    def seconds_left(self) -> float | None:
        """By the mean of the cells that have ended well; None before the first has."""
        ended = [o.seconds for o in self.outcomes.values() if not o.error and o.name not in ("inputs", "reference")]
        if not ended:
            return None
        mean, now = sum(ended) / len(ended), time.monotonic()
        left = 0.0
        for name in (work.chain.name for work in self.work if work.chain.name not in self.outcomes):
            left += max(mean - (now - self.began[name]), 0) if name in self.began else mean
        return left / self.workers

    def usd(self) -> float:
        """What the judge has cost, and the hours of the chains where a price of an hour is set."""
        running = [name for name in self.began if name not in self.outcomes]
        seconds = sum(outcome.seconds for outcome in self.outcomes.values())
        seconds += sum(time.monotonic() - self.began[name] for name in running)
        return sum(outcome.usd for outcome in self.outcomes.values()) + (self.usd_per_hour or 0) * seconds / 3600

    def __rich__(self) -> Group:
        running = [work.chain.name for work in self.work if work.chain.name in self.began]
        running = [name for name in running if name not in self.outcomes]
        failed = sum(bool(outcome.error) for outcome in self.outcomes.values())
        done, waiting = len(self.outcomes) - failed, len(self.work) - len(self.outcomes) - len(running)
        title = f"{done} done, {len(running)} running, {waiting} waiting, {failed} failed"
        if (left := self.seconds_left()) is not None:
            title += f"; expected end {datetime.now() + timedelta(seconds=left):%a %H:%M}"
        if usd := self.usd():
            title += f"; {usd:.2f} USD"
        table = Table("chain", "stage", "update", "loss", "seconds")
        for name in running:
            now, seconds = self.progress[name], time.monotonic() - self.began[name]
            table.add_row(name, now.stage, now.step, now.loss, f"{seconds:.0f}")
        return Group(Text(title), table)


def run_all(works: list[Work], params: Params, place: Place) -> list[Outcome]:
    """Run the chains on the cluster; returns how each ended. Ctrl-C ends them with their checkpoints saved."""
    launch = params.launch
    _, archive = snapshot()
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    shipped = ray.put(archive)
    task = ray.remote(run_on_node)
    refs: dict[str, Any] = {}
    for work in works:
        gpus = 0 if work.chain.name == "inputs" else launch.num_gpus
        options = {"num_cpus": launch.num_cpus, "num_gpus": gpus, "max_retries": launch.attempts - 1}
        before = [refs[name] for name in work.after]
        refs[work.chain.name] = task.options(name=work.chain.name, **options).remote(
            work.chain, shipped, place, launch.attempts, launch.patience, board, *before
        )
    display = Display(works, room(params), launch.usd_per_hour)
    names = {ref: name for name, ref in refs.items()}
    pending = list(names)
    try:
        with Live(display, console=display.console, transient=True) if display.console.is_terminal else nullcontext():
            while pending:
                done, pending = ray.wait(pending, timeout=1)
                display.update(ray.get(board.get.remote()))
                for ref in done:
                    display.ended(outcome_of(ref, names[ref]))
    except KeyboardInterrupt:
        print("stopping; what is in training saves a checkpoint", file=sys.stderr, flush=True)
        for ref in pending:
            ray.cancel(ref, force=False)
        ray.wait(pending, num_returns=len(pending), timeout=GRACE + 15)
        raise
    return [display.outcomes[work.chain.name] for work in works]


def outcome_of(ref: Any, name: str) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.RayError as error:
        return Outcome(name, 0.0, "", error=f"its worker was lost: {str(error).strip().splitlines()[-1]}")


def restore(targets: list[str], pull: bool) -> int:
    """`dvc repro` here, which takes what has run from the cache or the remote; waits for another that runs here."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *(["--pull"] if pull else []), *targets]
    log = Path(".prefscan/launch/workspace.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        code, output = run_leashed(command, Path(), dict(os.environ), log, lambda line: print(line, end="", flush=True))
        if code == 0 or not BUSY.search(output):
            return code
        time.sleep(BUSY_WAIT)


def report_failures(outcomes: list[Outcome]) -> None:
    """The last lines of what failed, and the names of what therefore did not run."""
    for outcome in outcomes:
        if outcome.error and outcome.error != NOT_RUN:
            print(f"\n{outcome.name} failed{f' on {outcome.node}' if outcome.node else ''}:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in outcome.error.splitlines()), file=sys.stderr)
    if skipped := [outcome.name for outcome in outcomes if outcome.error == NOT_RUN]:
        print(f"\nNot run, since what they need failed: {', '.join(skipped)}", file=sys.stderr)


def launch_sweep(address: str | None, dirty: bool) -> int:
    """Exit status of a launch; raises UserError where it cannot begin."""
    params = load()
    if not dirty and (changes := uncommitted()):
        listed = ", ".join(changes[:10]) + (f" and {len(changes) - 10} more" if len(changes) > 10 else "")
        raise UserError(f"not committed: {listed}; commit, or take the changes along with --dirty")
    place = settle_place(params, address is not None)
    works = plan_work(params, stale_stages(missing_data_is_stale=True))
    outcomes: list[Outcome] = []
    if works:
        start_ray(params, address)
        try:
            check_nodes(place, params)
            outcomes = run_all(works, params, place)
        finally:
            ray.shutdown()
    ended = {outcome.name for outcome in outcomes if not outcome.error}
    if len(ended) == len(works):
        return restore([], place.remote is not None)
    targets = [target for work in works if work.chain.name in ended for target in work.chain.targets]
    if targets:
        restore(targets, place.remote is not None)
    report_failures(outcomes)
    return FAILED


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="prefscan.launch", description="Run what is stale of the sweep, side by side."
    )
    parser.add_argument("--address", help="of a running Ray cluster, or auto; without it, a Ray of this machine's own")
    parser.add_argument("--dirty", action="store_true", help="take uncommitted changes along")
    arguments = parser.parse_args()

    def interrupted(*_: int | FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    Path(".prefscan").mkdir(exist_ok=True)
    try:
        with FileLock(".prefscan/launch.lock", timeout=0):
            code = launch_sweep(arguments.address, arguments.dirty)
    except Timeout:
        raise UserError("another launch runs in this workspace; wait for it, or end it") from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = STOPPED
    sys.exit(code)


if __name__ == "__main__":
    run_stage(main)
