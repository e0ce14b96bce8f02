"""`make audit` as `make check` runs it, with pip-audit asking a service of the test's own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PINNED = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
KNOWN = {
    "id": "PYSEC-0000-1",
    "summary": "a test's own",
    "affected": [{"package": {"name": "pyyaml", "ecosystem": "PyPI"}}],
}


@contextmanager
def service(known: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The address of a service in OSV's format, and the packages that it was asked for; `known` is by package."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(f"{query['package']['name']}=={query['version']}")
            found = known.get(query["package"]["name"])
            answer = json.dumps({"vulns": [found]} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def audit(address: str, fails: bool = False) -> str:
    """What `make audit` prints."""
    binaries = os.path.relpath(Path(sys.executable).parent, ROOT)
    environment = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": address, "NO_PROXY": "127.0.0.1"}
    # Of a `make test` that runs this: with them, the inner make says which folder it enters.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        ["make", f"BIN={binaries}", f"--old-file={binaries}/.ready", "audit"],
        cwd=ROOT,
        env=outside | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def test_every_pinned_version_is_looked_up() -> None:
    with service({}) as (address, asked):
        assert audit(address) == "No known vulnerability in a pinned version.\n"
    assert sorted(asked) == sorted(PINNED)


def test_a_known_vulnerability_fails() -> None:
    with service({"pyyaml": KNOWN}) as (address, _):
        output = audit(address, fails=True)
    assert "Found 1 known vulnerability in 1 package" in output
    assert "PYSEC-0000-1" in output


def test_without_a_service_it_says_that_nothing_was_audited() -> None:
    with service({}) as (address, _):
        pass  # nobody listens there any more
    assert audit(address).startswith("NOT AUDITED, no answer: all of the pinned versions. ")


@pytest.mark.parametrize("part", ["ruff check", "ruff format --check", "mypy", "audit"])
def test_make_check_runs_all_of_it(part: str) -> None:
    command = ["make", "--dry-run", "--old-file=.venv/bin/.ready", "check"]
    planned = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    assert part in planned
