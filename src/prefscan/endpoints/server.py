"""Start an OpenAI-compatible server for a stage, wait until it is healthy, and stop it whatever happens.

    prefscan serve      # or one vLLM with the base and all cells of the grid, until Ctrl-C

That one loads the weights at its start and names them by their hash: after a new training it has to be restarted.
vLLM serves the base with a cell's adapter on it; `transformers serve` has no adapters and serves merged models. Both
listen on the loopback interface alone. A server ends with its stage: on success, error, Ctrl-C and SIGTERM it is
stopped here, and after kill -9 by the kernel, where util-linux's setpriv is there to ask it to.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, sha256
from prefscan.common.paths import BASE, MERGED, RUNS
from prefscan.endpoints.workers import sigterm_exits
from prefscan.models.loading import MANIFEST, parts_of_cell

STARTUP = 1800.0  # seconds until healthy; vLLM compiles and captures graphs for a 7B model in minutes
STOPPING = 20.0  # seconds from SIGTERM to SIGKILL
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says

Kind = Literal["vllm", "transformers"]


def executable(name: str) -> str:
    """The program of that name, of this virtual environment or on the PATH."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=places)
    if found is None:
        raise UserError(
            f"answer.server.kind: {name}, and there is no program {name} on the PATH; install it (vLLM pins its own "
            "torch: in an environment of its own), or set answer.server.base_url to a server that runs"
        )
    return found


def served_name(key: str) -> str:
    """A model's name at a server that outlives stages: `KEY@` and 12 digits of a SHA-256 of its weights.

    A server that was started before the weights changed does not know the new name, where under the bare key it would
    answer with the old ones.
    """
    folder = BASE if key == "base" else MERGED / key
    if (folder / MANIFEST).exists():  # has the hashes already, which parts_of_cell compares with the files
        weights = [part["sha256"] for _, part in sorted(read_json(folder / MANIFEST).items())]
    else:
        weights = [{path.name: sha256(path) for path in folder.glob("*.safetensors")}]
    return f"{key}@{hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Served:
    """What a server is started with: vLLM serves the model as `name`, and each adapter under its own name."""

    kind: Kind
    model: Path
    adapters: dict[str, Path]
    dtype: str
    name: str = "base"

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPES[self.dtype]]
        if self.kind == "transformers":
            if self.adapters:
                raise UserError(
                    "answer.server.kind: transformers serve has no adapters and merge.format is adapter; set "
                    "merge.format: model, or take vllm"
                )
            return [executable("transformers"), "serve", str(self.model), *common]
        # Without --generation-config vllm, the model's own file would change the sampling that MT-Bench prescribes.
        line = [executable("vllm"), "serve", str(self.model), *common, "--served-model-name", self.name]
        line += ["--generation-config", "vllm"]
        if self.adapters:
            configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in self.adapters.values()]
            rank = max(config["r"] for config in configs)
            line += ["--enable-lora", "--max-lora-rank", str(next(r for r in LORA_RANKS if r >= rank))]
            line += ["--lora-modules", *(f"{adapter}={folder}" for adapter, folder in self.adapters.items())]
        return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(port: int) -> bool:
    try:
        with DIRECT.open(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def await_health(process: subprocess.Popen[bytes], port: int, log: Path, startup: float) -> None:
    deadline = time.monotonic() + startup
    while not healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            state = "is not healthy" if process.returncode is None else f"ended with {process.returncode}"
            last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise UserError(f"answer.server: the server {state} after {startup:.0f} s at most; {log} ends: {last}")
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started, its process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            continue
        # The leader has ended; a worker that outlived it gets the second signal.
    process.wait()


@contextmanager
def running_server(served: Served, log: Path, startup: float = STARTUP, port: int | None = None) -> Iterator[str]:
    """The base URL of a healthy server at `port`, or a free one, which is stopped when the block ends.

    Its output goes to `log`. Raises UserError when the program is missing, when it ends before it is healthy, and when
    it is not after `startup` seconds. To be used in the main thread, since SIGTERM becomes an exit that passes through
    the block's end.
    """
    port = port or free_port()
    line = served.command(port)
    if setpriv := shutil.which("setpriv"):
        line = [setpriv, "--pdeathsig", "KILL", "--", *line]
    log.parent.mkdir(parents=True, exist_ok=True)
    with sigterm_exits():
        with log.open("wb") as file:
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            await_health(process, port, log, startup)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(process)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; default: 8000")


def main(port: int) -> None:
    params = load()
    adapters = {}
    for cell in params.grid.cells:
        _, adapter = parts_of_cell(MERGED / cell.key)
        if adapter is None:
            raise UserError(
                f"{MERGED / cell.key} holds no adapter's manifest, and one server serves adapters alone; run "
                "`dvc repro merge` with merge.format: adapter"
            )
        adapters[served_name(cell.key)] = adapter
    log = RUNS / "server/all.log"
    served = Served("vllm", BASE, adapters, params.answer.dtype, served_name("base"))
    with running_server(served, log, port=port) as url:
        try:  # at once: Ctrl-C may come as soon as the address is read
            print(f"base and {len(adapters)} cells: dvc repro, with answer.server.base_url: {url}", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")
