"""Run a command that never outlives whoever asked for it: python supervisor.py COMMAND…

DVC starts a stage and does not pass signals on to it, and a worker of a cluster may vanish without a word. On SIGTERM,
on Ctrl-C, and when its parent has died (Linux), this process asks the command and everything that it has started to
end, with SIGTERM, so that a stage in training saves a checkpoint; what is left after GRACE seconds is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

GRACE = 120.0  # seconds: an update of a 7B model and the checkpoint after it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def tie_to_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, and to be the parent of orphans, so that they can be awaited."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before it was asked for
        sys.exit(128 + signal.SIGTERM)


def children_gone(seconds: float) -> bool:
    """Whether all children, adopted ones too, have ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)
        except ChildProcessError:
            return True
    return False


def end(group: int) -> None:
    for sign, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(group, sign)
        except ProcessLookupError:
            return
        if children_gone(seconds):
            return


def main() -> None:
    signs = {signal.SIGTERM, signal.SIGINT}

    def asked_to_end(number: int, _: FrameType | None) -> None:
        for sign in signs:
            signal.signal(sign, signal.SIG_IGN)
        end(process.pid)
        sys.exit(128 + number)

    signal.pthread_sigmask(signal.SIG_BLOCK, signs)  # until there is something to end
    tie_to_parent()
    process = subprocess.Popen(
        sys.argv[1:], start_new_session=True, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, signs)
    )
    for sign in signs:
        signal.signal(sign, asked_to_end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signs)
    code = process.wait()
    end(process.pid)  # what the command has left behind
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
