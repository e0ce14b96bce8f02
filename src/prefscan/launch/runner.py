"""Chains on Ray, of this machine or of a running cluster.

A Ray task is a chain in a clone of its own (clone.py). Ray begins it when what it waits for has ended and a node has
room, and again where a worker or a node is lost.
"""

import importlib.metadata
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.live import Live
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from prefscan.common.config import Launch, Params
from prefscan.common.errors import UserError
from prefscan.common.libraries import LIBRARIES
from prefscan.launch.clone import NOT_RUN, Chain, Outcome, Place, Progress, remove_left_clones, run_chain
from prefscan.launch.display import Display
from prefscan.launch.supervisor import GRACE
from prefscan.repo.cache import remove_damaged

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError:
    sys.exit("prefscan: launch needs Ray; install it: pip install -c constraints.txt -e '.[cluster]'")

# The same on every node: dvc and ray to work together, and those of a result, or none could go on with another's work.
SAME = (*LIBRARIES, "dvc", "ray")
CHECKING = 3600.0  # seconds; hashing a node's cache of a terabyte
SLOW = ".*timed out during startup"  # Ray gives its processes 30 s, which a busy machine may exceed


@contextmanager
def connected(params: Params, address: str | None) -> Iterator[None]:
    """A cluster to run on: a running one, or one of this machine with room for `launch.cells`, or for a cell a GPU.

    Raises UserError where there is no cluster, and where no node could ever hold a cell.
    """
    try:
        start_ray(params.launch, address)
        yield
    finally:
        ray.shutdown()


@contextmanager
def interruptible_children() -> Iterator[None]:
    """Ray stops a task by SIGINT, which a script's background job ignores, with every process that it starts."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)


def start_ray(launch: Launch, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--address {address}: no Ray cluster lets us in there ({reason}); `ray start` one"
            ) from None
    else:
        for attempt in Retrying(stop=stop_after_attempt(3), retry=retry_if_exception_message(match=SLOW), reraise=True):
            with attempt, interruptible_children():
                ray.init(
                    address="local",
                    # Without GPUs, Ray's CPUs are what limits the cells at once; with them, the GPUs alone do.
                    num_cpus=1000 if launch.num_gpus else ceil(launch.cells * launch.num_cpus),
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


def key_variables(params: Params) -> list[str]:
    """The environment variables with keys that the stages of these parameters read."""
    server = params.answer.server
    named = [getattr(params.judge, "key_variable", None), server.key_variable if server else None]
    if params.runtime.report_to == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        named.append("WANDB_API_KEY")
    return sorted({name for name in named if name})


@dataclass(frozen=True)
class Needs:
    """What every node must have: versions of libraries, environment variables, and a file in a shared state folder."""

    versions: dict[str, str]
    variables: list[str]
    token: Path | None


@contextmanager
def needed(place: Place, params: Params) -> Iterator[Needs]:
    """What nodes need while the `with` block runs."""
    token = place.state / f".prefscan/launch/{uuid4().hex}.token" if params.launch.state else None
    if token:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        yield Needs({name: _version(name) for name in SAME}, key_variables(params), token)
    finally:
        if token:
            token.unlink(missing_ok=True)


def complaints_of(place: Place, needs: Needs) -> list[str]:
    """Why this node cannot work, in sentences."""
    complaints = [
        f"{name} is {own} there and {version} here; install constraints.txt"
        for name, version in needs.versions.items()
        if (own := _version(name)) != version
    ]
    complaints += [
        f"{name} is not set; export it where `ray start` runs" for name in needs.variables if not os.environ.get(name)
    ]
    for folder in (place.clones, place.cache, place.state):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            complaints.append(f"{folder} cannot be written ({error.strerror}); set launch.scratch or launch.state")
    if os.path.exists(place.clones) and place.clones.stat().st_uid != os.getuid():  # code is run from there
        complaints.append(f"{place.clones} is another user's; set launch.scratch")
    if needs.token and not os.path.exists(needs.token):  # Path.exists raises for a folder that may not be looked into
        complaints.append(
            f"launch.state: {place.state} is not the folder of that name on the launching machine; share it"
        )
    return complaints


def check_node(place: Place, needs: Needs) -> list[str]:
    """A Ray task: why the node cannot work. Removes what is damaged from its cache, to be made again."""
    complaints = complaints_of(place, needs)
    if place.marker and not place.marker.exists():
        complaints.append(f"the DVC remote {place.marker.parent} is not there; mount it")
    if not complaints:
        remove_left_clones(place.clones)
        if place.remote:  # else the cache is the workspace's, and the launch has checked it
            remove_damaged(place.cache / "files/md5")
    return complaints


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def check_nodes(place: Place, needs: Needs) -> None:
    """Raises UserError with what each node lacks; looks at all of them at once."""
    task = ray.remote(num_cpus=0)(check_node)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    checks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(place, needs)
        for node in nodes
    ]
    try:
        found = ray.get(checks, timeout=CHECKING)
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a node could not be asked ({str(error).strip().splitlines()[-1]}); is prefscan's environment on each?"
        ) from None
    complaints = [
        f"{address}: {complaint}" for address, own in zip(nodes.values(), found, strict=True) for complaint in own
    ]
    if complaints:
        raise UserError("; ".join(complaints))


class Board:
    """A Ray actor that knows what each running chain is doing, for the display."""

    def __init__(self) -> None:
        self.progress: dict[str, Progress] = {}

    def put(self, name: str, progress: Progress) -> None:
        self.progress[name] = progress

    def get(self) -> dict[str, Progress]:
        return self.progress


def run_on_node(
    chain: Chain, archive: bytes, place: Place, needs: Needs, launch: Launch, board: Any, *before: Outcome
) -> Outcome:
    """A Ray task: the chain, unless one that it waits for has failed, or the node joined later and is not fit.

    An unfit node keeps its chain for `launch.patience` seconds: failing at once, it would take one after the other.
    """
    if any(outcome.error for outcome in before):
        return Outcome(chain.name, 0.0, "", error=NOT_RUN)
    report = partial(board.put.remote, chain.name)
    deadline = time.monotonic() + launch.patience
    while complaints := complaints_of(place, needs):
        if time.monotonic() > deadline:
            return Outcome(chain.name, launch.patience, os.uname().nodename, error="\n".join(complaints))
        report(Progress("node not fit"))
        time.sleep(1)
    return run_chain(chain, archive, place, launch.attempts, launch.patience, report)


def run_all(chains: list[Chain], params: Params, place: Place, needs: Needs, archive: bytes) -> list[Outcome]:
    """Run the chains on the cluster; returns how each ended. Ctrl-C ends them with their checkpoints saved."""
    launch = params.launch
    # On this node: it is lost with nothing but the launch itself.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    shipped = ray.put(archive)
    task = ray.remote(run_on_node)
    refs: dict[str, Any] = {}
    for chain in chains:
        cpus, gpus = (launch.num_cpus, launch.num_gpus) if chain.computes else (min(launch.num_cpus, 1), 0)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": launch.attempts - 1}
        before = [refs[name] for name in chain.after]
        refs[chain.name] = task.options(name=chain.name, **options).remote(
            chain, shipped, place, needs, launch, board, *before
        )
    display = Display(chains, room(params), launch.usd_per_hour)
    of_ref = {refs[chain.name]: chain for chain in chains}
    pending = list(of_ref)
    try:
        with Live(display, console=display.console, transient=True) if display.console.is_terminal else nullcontext():
            while pending:
                done, pending = ray.wait(pending, timeout=1)
                if display.console.is_terminal:  # nothing else shows what is running
                    display.update(ray.get(board.get.remote()))
                for ref in done:
                    display.ended(outcome_of(ref, of_ref[ref], display.outcomes))
    except KeyboardInterrupt:
        print("stopping; what is in training saves a checkpoint", file=sys.stderr, flush=True)
        for ref in pending:
            ray.cancel(ref, force=False)
        ray.wait(pending, num_returns=len(pending), timeout=GRACE + 15)
        raise
    return [display.outcomes[chain.name] for chain in chains]


def outcome_of(ref: Any, chain: Chain, others: dict[str, Outcome]) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.RayTaskError as error:
        return Outcome(chain.name, 0.0, "", error=str(error))
    except ray.exceptions.RayError as error:
        if any(others[name].error for name in chain.after if name in others):  # Ray hands the error on
            return Outcome(chain.name, 0.0, "", error=NOT_RUN)
        return Outcome(chain.name, 0.0, "", error=f"its worker was lost: {str(error).strip().splitlines()[-1]}")
