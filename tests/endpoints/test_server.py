"""Real servers are started, waited for and stopped, however their stage ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mtbench_data import ROOT, write_params
from prefscan.common.errors import UserError
from prefscan.common.io import write_json
from prefscan.endpoints.server import Served, free_port, healthy, running_server, served_name
from prefscan.endpoints.server import main as serving_main
from prefscan.models.loading import load_model, manifest
from tiny import make_tiny_model, random_adapter


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


def ended(process: psutil.Process, seconds: float = 30) -> bool:
    """Whether the process is gone, or only its exit status is left, within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("fails", [False, True])
def test_a_server_is_healthy_within_the_block_and_gone_after_it(in_tmp: Path, tiny_model: Path, fails: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with running_server(Served("transformers", tiny_model, {}, "fp32"), Path("server.log")) as url:
            assert url.startswith("http://127.0.0.1:")
            assert healthy(port_of(url))
            children = psutil.Process().children(recursive=True)
            (server,) = [child for child in children if "serve" in child.cmdline()]
            listening = [c.laddr.ip for c in server.net_connections() if c.status == psutil.CONN_LISTEN]
            assert set(listening) == {"127.0.0.1"}
            if fails:
                raise KeyError("in the block")
    except KeyError:
        assert fails
    assert ended(server)
    assert not healthy(port_of(url))
    assert "Finished server process" in Path("server.log").read_text()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_cannot_start_is_named_with_the_end_of_its_log(in_tmp: Path) -> None:
    (in_tmp / "empty").mkdir()
    with (
        pytest.raises(UserError, match=r"^answer\.server: the server ended with \d+ .* server\.log ends: .*empty"),
        running_server(Served("transformers", in_tmp / "empty", {}, "fp32"), Path("server.log")),
    ):
        pass


def test_a_server_that_is_never_healthy_is_stopped(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = in_tmp / "bin/vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ntrap '' TERM\necho loading\nexec sleep 300\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("prefscan.endpoints.server.STOPPING", 0.5)
    with (
        pytest.raises(UserError, match=r"^answer\.server: the server is not healthy after 1 s .* ends: loading$"),
        running_server(Served("vllm", in_tmp, {}, "fp32"), Path("server.log"), startup=1.0),
    ):
        pass
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "300"]]
    assert all(ended(process, 5) for process in left)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_server_does_not_outlive_its_stage(in_tmp: Path, tiny_model: Path, number: signal.Signals) -> None:
    script = (
        "import sys, time; from pathlib import Path; from prefscan.endpoints.server import Served, running_server\n"
        "with running_server(Served('transformers', Path(sys.argv[1]), {}, 'fp32'), Path('server.log')) as url:\n"
        "    print(url, flush=True); time.sleep(120)\n"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_model)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert stage.stdout
    url = stage.stdout.readline().strip()
    assert healthy(port_of(url))
    children = psutil.Process(stage.pid).children(recursive=True)
    assert children
    stage.send_signal(number)
    assert stage.wait(60) != 0
    assert all(ended(child) for child in children)
    assert not healthy(port_of(url))


def test_vllm_serves_the_base_and_the_adapters_by_their_names(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of vLLM 0.33's documentation; its program was not run here, since it needs CUDA."""
    program = in_tmp / "bin/vllm"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    for name, rank in (("ipo-0.1-8", 4), ("kto-0.5-8", 24)):
        (in_tmp / name).mkdir()
        (in_tmp / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapters = {name: in_tmp / name for name in ("ipo-0.1-8", "kto-0.5-8")}
    line = Served("vllm", Path("models/base"), adapters, "bf16").command(8000)
    assert line[:3] == [str(program), "serve", "models/base"]
    options = " ".join(line[3:])
    assert options == (
        "--host 127.0.0.1 --port 8000 --dtype bfloat16 --served-model-name base --generation-config vllm --enable-lora "
        f"--max-lora-rank 32 --lora-modules ipo-0.1-8={in_tmp}/ipo-0.1-8 kto-0.5-8={in_tmp}/kto-0.5-8"
    )
    assert "lora" not in " ".join(Served("vllm", Path("models/base"), {}, "fp32").command(8000))


def test_what_cannot_be_served_is_refused_with_a_remedy(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"no adapters and merge\.format is adapter; set merge\.format: model, or take vllm$"
    ):
        Served("transformers", Path("models/base"), {"ipo-0.1-8": Path("adapter")}, "fp32").command(8000)
    monkeypatch.setenv("PATH", str(in_tmp))
    with pytest.raises(UserError, match=r"^answer\.server\.kind: vllm, .* no program vllm on the PATH; install"):
        Served("vllm", Path("models/base"), {}, "fp32").command(8000)


VLLM = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print(json.dumps(sys.argv[1:]), flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def trained(in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cells whose merge wrote a manifest, and a stand-in for vLLM, which needs CUDA, that says what it was told."""
    program = in_tmp / "bin/vllm"
    program.parent.mkdir()
    program.write_text(VLLM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    write_params(in_tmp, loss="ipo", beta=0.1, steps=8, grid={"loss": ["ipo", "sigmoid"], "beta": [0.1], "steps": [8]})
    (in_tmp / "models").mkdir()
    (in_tmp / "models/base").symlink_to(tiny_model)
    for key in ("ipo-0.1-8", "sigmoid-0.1-8"):
        random_adapter(load_model(tiny_model, "fp32")).save_pretrained(in_tmp / "models/adapters" / key)
        written = manifest(Path("models/base"), Path("models/adapters", key))
        write_json(Path("models/merged", key, "manifest.json"), written)
    return in_tmp


def test_one_server_serves_the_base_and_every_cell(trained: Path) -> None:
    port = free_port()
    serving = subprocess.Popen(
        [sys.executable, "-m", "prefscan", "serve", "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdout
    assert serving.stdout.readline() == (
        f"base and 2 cells: dvc repro, with answer.server.base_url: http://127.0.0.1:{port}/v1\n"
    )
    assert healthy(port)
    told = json.loads((trained / "runs/server/all.log").read_text().splitlines()[0])
    assert told[:2] == ["serve", "models/base"]
    assert told[told.index("--served-model-name") + 1] == served_name("base")
    modules = [f"{served_name(key)}=models/adapters/{key}" for key in ("ipo-0.1-8", "sigmoid-0.1-8")]
    assert told[told.index("--lora-modules") + 1 :] == modules
    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 0
    assert not healthy(port)


def test_a_name_is_that_of_the_weights(trained: Path) -> None:
    first, second = "ipo-0.1-8", "sigmoid-0.1-8"
    names = {key: served_name(key) for key in ("base", first, second)}
    for key, name in names.items():
        assert re.fullmatch(rf"{re.escape(key)}@[0-9a-f]{{12}}", name)
        assert served_name(key) == name

    def train(key: str, seed: int) -> None:
        random_adapter(load_model(Path("models/base"), "fp32"), seed=seed).save_pretrained(f"models/adapters/{key}")
        write_json(
            Path("models/merged", key, "manifest.json"), manifest(Path("models/base"), Path("models/adapters", key))
        )

    train(first, 1)
    assert served_name(first) != names[first]
    assert served_name(second) == names[second]
    train(first, 0)
    assert served_name(first) == names[first]
    # Another base is another model to an adapter, too.
    Path("models/base").unlink()
    make_tiny_model(Path("models/base"), seed=1)
    train(second, 0)
    assert served_name("base") != names["base"]
    assert served_name(second) != names[second]


@pytest.mark.usefixtures("trained")
def test_merged_cells_are_not_served_by_one_server() -> None:
    Path("models/merged/sigmoid-0.1-8/manifest.json").unlink()
    with pytest.raises(UserError, match=r"^models/merged/sigmoid-0\.1-8 holds no adapter's manifest"):
        serving_main(8000)
