"""A leashed command ends with whoever asked for it, and gets the time to save its work. Real processes and signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prefscan.launch import supervisor

LEASH = [sys.executable, "-P", supervisor.__file__]
# A shell that starts a worker and waits, as DVC does, and passes no signal on; the worker saves when asked to end.
WORKER = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path("saved").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, save if sys.argv[1] == "saves" else signal.SIG_IGN)
pathlib.Path("started").touch()
time.sleep(60)
"""


def command(kind: str) -> list[str]:
    return ["sh", "-c", f'{sys.executable} -c "$0" {kind}; exit $?', WORKER]


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_status_is_the_commands(code: int) -> None:
    assert subprocess.run([*LEASH, "sh", "-c", f"exit {code}"]).returncode == code


def test_a_command_that_a_signal_ends_says_so_as_a_shell_does() -> None:
    assert subprocess.run([*LEASH, "sh", "-c", "kill -9 $$"]).returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_lets_the_command_save_first(in_tmp: Path, sign: int) -> None:
    process = subprocess.Popen([*LEASH, *command("saves")])
    wait_for(Path("started").exists)
    below = descendants(process)
    process.send_signal(sign)
    assert process.wait(30) == 128 + sign
    assert Path("saved").exists()
    assert all_gone(below)


def test_what_does_not_end_is_killed(in_tmp: Path) -> None:
    impatient = "import prefscan.launch.supervisor as l; l.GRACE = 0.5; l.main()"
    environment = os.environ | {"PYTHONPATH": str(Path(supervisor.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", impatient, *command("stays")], env=environment)
    wait_for(Path("started").exists)
    below = descendants(process)
    process.terminate()
    process.wait(30)
    assert all_gone(below)
    assert not Path("saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_when_its_parent_is_killed_the_command_ends_and_saves(in_tmp: Path) -> None:
    starts = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    parent = subprocess.Popen([sys.executable, "-c", starts, *LEASH, *command("saves")])
    wait_for(Path("started").exists)
    below = descendants(parent)
    assert len(below) >= 3  # leash, shell, worker
    parent.kill()
    parent.wait()
    wait_for(lambda: all_gone(below), 30)
    assert Path("saved").exists()
