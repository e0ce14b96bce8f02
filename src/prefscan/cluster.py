"""Chains on Ray, of this machine or of a running cluster.

A Ray task is a chain in a clone of its own (clones.py). Ray begins it when what it waits for has ended and a node has
room, and again where a worker or a node is lost.
"""

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import ceil
from typing import Any

from rich.live import Live
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from prefscan.cache import remove_damaged
from prefscan.clones import NOT_RUN, Chain, Outcome, Place, Progress, run_chain, snapshot
from prefscan.display import Display
from prefscan.errors import UserError
from prefscan.leash import GRACE
from prefscan.params import Launch, Params

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError:
    sys.exit("prefscan: launch needs Ray; install it: pip install -c constraints.txt '.[cluster]'")

LIBRARIES = ("bitsandbytes", "dvc", "peft", "ray", "torch", "transformers", "trl")  # the same on every node
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


def start_ray(launch: Launch, address: str | None) -> None:
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


def key_variables(params: Params) -> list[str]:
    """The environment variables with keys that the stages of these parameters read."""
    server = params.answer.server
    named = [getattr(params.judge, "key_variable", None), server.key_variable if server else None]
    return sorted({name for name in named if name})


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


def run_all(chains: list[Chain], params: Params, place: Place) -> list[Outcome]:
    """Run the chains on the cluster; returns how each ended. Ctrl-C ends them with their checkpoints saved."""
    launch = params.launch
    _, archive = snapshot()
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    shipped = ray.put(archive)
    task = ray.remote(run_on_node)
    refs: dict[str, Any] = {}
    for chain in chains:
        gpus = 0 if chain.name == "inputs" else launch.num_gpus
        options = {"num_cpus": launch.num_cpus, "num_gpus": gpus, "max_retries": launch.attempts - 1}
        before = [refs[name] for name in chain.after]
        refs[chain.name] = task.options(name=chain.name, **options).remote(
            chain, shipped, place, launch.attempts, launch.patience, board, *before
        )
    display = Display(chains, room(params), launch.usd_per_hour)
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
    return [display.outcomes[chain.name] for chain in chains]


def outcome_of(ref: Any, name: str) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.RayError as error:
        return Outcome(name, 0.0, "", error=f"its worker was lost: {str(error).strip().splitlines()[-1]}")
