"""A clone of the workspace in which one chain of stages runs, on this machine or another.

A clone is the files of a snapshot without their history, so that uncommitted changes reach it and no branch. It shares
a DVC cache with the other clones of its node, and with all that may go on with its work the folder of unfinished work.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from prefscan.common.io import read_json
from prefscan.common.paths import MTBENCH_METRICS
from prefscan.launch import supervisor
from prefscan.repo.config import configure_clone, dvc_command

SHARED = (".prefscan", "runs")  # unfinished work and live logs, linked from every clone
NOT_RUN = "not run"  # the error of a chain whose predecessor has failed
TAIL = 15  # lines of a failed chain's log that are shown
KILLED = re.compile(
    r"exited with (-\d+|137|143)|: terminated at update"
)  # a stage that a signal ended, as the kernel does out of memory
KILLED_CODES = (-15, -9, 137, 143)  # of dvc itself, and of what holds it
BUSY = re.compile(r"Unable to acquire lock|it is being blocked by|another process is training")
BUSY_WAIT = 5.0  # seconds
STAGE = re.compile(r"(?:Running stage|Stage) '([^'@]+)(?:@[^']*)?'")
STEP = re.compile(r"(\d+)/(\d+) \[")  # tqdm's
LOSS = re.compile(r"'loss': '?([-+.\de]+)")  # transformers' log of an update


@dataclass(frozen=True)
class Chain:
    """Stages that run one after the other in one clone, after the chains named in `after`.

    A cell's chain has the cell's key for a name. One that `computes` nothing fetches data or asks a server.
    """

    name: str
    targets: tuple[str, ...]
    after: tuple[str, ...] = ()
    computes: bool = True


@dataclass(frozen=True)
class Place:
    """Where a node keeps things.

    On one machine clones share the workspace's own cache, and `remote` is None; else it is DVC's configuration of the
    default remote. `marker` is a file in a remote that is a folder: without it, the folder is not the remote's.
    """

    clones: Path
    cache: Path
    state: Path
    remote: dict[str, Any] | None
    marker: Path | None

    def environment(self, folder: Path) -> dict[str, str]:
        """For commands in a clone: its own code and this Python's programs."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return os.environ | {"PATH": path, "PYTHONPATH": str(folder / "src")}


@dataclass(frozen=True)
class Progress:
    stage: str = "clone"
    step: str = ""
    loss: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a chain ended; `error` is empty when it ended well, else its log's last lines. `usd` went to its judge."""

    name: str
    seconds: float
    node: str
    usd: float = 0.0
    error: str = ""


def remove_left_clones(clones: Path) -> None:
    """Remove what killed workers have left, but for clones in which a process still works."""
    used = {process.info["cwd"] for process in psutil.process_iter(["cwd"])}
    for folder in clones.iterdir() if clones.exists() else ():
        if not any(cwd and Path(cwd).is_relative_to(folder) for cwd in used):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_clone(name: str, archive: bytes, place: Place) -> Iterator[Path]:
    """A folder with the snapshot's files that knows its cache, remote and unfinished work; removed after the block.

    Never the folder of an attempt before, in which a process may still be saving its work.
    """
    place.clones.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f"{name}.", dir=place.clones))
    try:
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            # An attribute, since Python 3.11 before 3.11.4 has no such argument, and knows neither filter nor warning.
            # Not the data filter, which refuses links to absolute paths: a workspace may have them.
            tar.extraction_filter = getattr(tarfile, "tar_filter", None)
            tar.extractall(folder)  # noqa: S202 - git made the archive, of this repository's own files
        configure_clone(folder, place.cache, place.remote)
        for shared in SHARED:
            (place.state / shared).mkdir(parents=True, exist_ok=True)
            (folder / shared).symlink_to(place.state / shared)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_supervised(
    command: list[str], folder: Path, environment: dict[str, str], log: Path, seen: Callable[[str], None]
) -> tuple[int, str]:
    """Exit status and output of a command that ends with this process; `seen` is called with each line.

    An exception in this process, Ctrl-C included, asks the command to end and waits until it has.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", supervisor.__file__, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout
    stdout = process.stdout

    def read() -> str:
        lines = []
        with log.open("a", encoding="utf-8") as file:
            for line in stdout:  # a progress bar's carriage return ends a line, too
                file.write(line)
                file.flush()
                lines.append(line)
                seen(line)
        return "".join(lines)

    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read)
        try:
            # Not at once: Ray's way to interrupt a task does not wake it from a wait without end.
            while not wait([reading], timeout=0.2).done:
                pass
            output = reading.result()
            return process.wait(), output
        finally:
            process.terminate()
            process.wait()


def progress_after(line: str, before: Progress) -> Progress:
    """What a line of DVC's, tqdm's or transformers' output says, the rest as before."""
    if found := STAGE.search(line):
        return Progress(found[1])
    step, loss = STEP.search(line), LOSS.search(line)
    if before.stage != "train" or not (step or loss):
        return before
    return Progress("train", f"{step[1]} of {step[2]}" if step else before.step, loss[1] if loss else before.loss)


def run_chain(
    chain: Chain, archive: bytes, place: Place, attempts: int, patience: float, report: Callable[[Progress], None]
) -> Outcome:
    """Run a chain in a clone of its own; its log is kept with the unfinished work."""
    started, usd = time.perf_counter(), 0.0
    try:
        with new_clone(chain.name, archive, place) as folder:
            error = run_stages(chain, folder, place, attempts, patience, report)
            judged = [target.removeprefix("mtbench")[1:] for target in chain.targets if target.startswith("mtbench")]
            scores = [folder / MTBENCH_METRICS / f"{key}.json" for key in judged]
            usd = sum(read_json(path)["usd"] for path in scores if path.exists())
    except OSError as fault:  # no room for the clone or the log, or no right to write them
        error = f"{type(fault).__name__}: {fault}; make room or access and launch again"
    return Outcome(chain.name, time.perf_counter() - started, os.uname().nodename, usd, error)


def run_stages(
    chain: Chain, folder: Path, place: Place, attempts: int, patience: float, report: Callable[[Progress], None]
) -> str:
    """Run a chain in its clone and hand its results over: to the shared cache, and by `push` to the remote.

    A node that is lost takes with it what it has not pushed, so a stage's results go to the remote as soon as it has
    ended. A stage that a signal has ended is run again, `attempts` times in all; a lock that another process holds is
    waited for, and so is a remote that is gone before the chain or after it, for `patience` seconds. Returns the last
    lines of what failed, if anything.
    """
    log = place.state / ".prefscan/launch" / f"{chain.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    progress = Progress()

    def seen(line: str) -> None:
        nonlocal progress
        after = progress_after(line, progress)
        if after != progress:
            progress = after
            report(progress)

    def dvc(*arguments: str) -> tuple[int, str]:
        return run_supervised(dvc_command("--wait-for-lock", *arguments), folder, place.environment(folder), log, seen)

    def reproduce(targets: tuple[str, ...]) -> str:
        nonlocal attempts
        while True:
            code, output = dvc("repro", *(["--pull"] if place.remote else []), *targets)
            if code == 0:
                return ""
            if BUSY.search(output):
                report(Progress("waits for another process"))
                time.sleep(BUSY_WAIT)
            elif attempts > 1 and (code in KILLED_CODES or KILLED.search(output)):
                attempts -= 1
            else:
                return _tail(output) or f"dvc ended with status {code}"

    def hand_over(targets: tuple[str, ...], patience: float) -> str:
        """Push, again and again while it fails; returns the last lines of a push that failed to the end."""
        if gone := await_remote(place, patience):
            return gone
        report(Progress("push"))
        pushes = Retrying(
            stop=stop_after_delay(patience),
            wait=wait_exponential(max=60),
            retry=retry_if_result(lambda done: done[0] != 0),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else (1, ""),
        )
        code, output = pushes(dvc, "push", "--run-cache", *targets)
        return _tail(output) if code else ""

    report(progress)
    if place.remote is None:
        return reproduce(chain.targets)
    if not (failed := await_remote(place, patience)):
        for target in chain.targets:
            if error := reproduce((target,)):
                return error
            if target != chain.targets[-1]:
                hand_over((target,), 0)  # what that cannot send, the last one does
        failed = hand_over(chain.targets, patience)
    return f"{failed}\nnothing is lost: the node's cache has what has run; launch again" if failed else ""


def await_remote(place: Place, patience: float) -> str:
    """Wait for a folder that is gone, as one that is not mounted: DVC would run all anew and push to the wrong disk.

    Returns what is wrong where it is not back in time.
    """
    deadline = time.monotonic() + patience
    while place.marker and not place.marker.exists():
        if time.monotonic() > deadline:
            return f"the DVC remote {place.marker.parent} is gone; mount it, or raise launch.patience"
        time.sleep(1)
    return ""


def _tail(output: str) -> str:
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL:])
