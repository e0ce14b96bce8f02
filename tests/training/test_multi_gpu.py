"""Two processes under a real `accelerate launch`, on the CPU with gloo, against one; and what a kill costs them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

from prefscan.common import paths
from prefscan.common.config import Accelerate, Lora
from prefscan.common.errors import UserError
from prefscan.models.loading import load_model
from prefscan.stages import train as train_stage
from prefscan.training.checkpoints import SEAL, last_checkpoint
from prefscan.training.multi_gpu import WholeRounds, launch
from tiny import random_adapter
from train_data import QUIET, changed, with_recipe, write_inputs
from two_processes import DDP, logps_and_gradients

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
CELLS = [(loss, layout) for loss in ("sigmoid", "kto_pair") for layout in ("packed", "padded")] + [("kto", "packed")]
LONG = "ipo-0.3-20"

# The same data.


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("pairs", [1, 2, 12, 13, 16])
def test_an_update_gets_the_micro_batches_that_one_process_gives_it(
    pairs: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefscan.training.multi_gpu.world", lambda: type("World", (), {"num_processes": processes}))
    sampler, size, accumulation = SequentialSampler(range(pairs)), 2, 6
    dealt = [list(BatchSamplerShard(WholeRounds(sampler, size), processes, index)) for index in range(processes)]
    assert {len(batches) for batches in dealt} == {len(WholeRounds(sampler, size)) // processes}
    alone = list(BatchSampler(sampler, size, drop_last=False))
    share = accumulation // processes
    for update in range(-(-len(alone) // accumulation)):
        expected = alone[update * accumulation :][:accumulation]
        rounds = zip(*(batches[update * share :][:share] for batches in dealt), strict=True)
        found = [batch for each in rounds for batch in each]
        assert found == expected + [[]] * (len(found) - len(expected))
        assert len(found) - len(expected) < processes


# The same result.


def lay_out(folder: Path, loss: str, steps: int, layout: str, base: Path, pairs: list[Any], params: Any) -> Path:
    """A cell for two processes: 7 micro-batches an epoch, the last of one pair, in updates of 4 and 3."""
    changes = {
        "accelerate": Accelerate(**DDP),
        "layout": layout,
        "lora": Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    train, _ = changed(params.train, QUIET, **changes)
    folder.mkdir()
    recipe = with_recipe(params, train, seed=11, loss=loss, beta=0.3, steps=steps)
    write_inputs(folder, base, pairs[:13], pairs[13:22], recipe)
    return folder


def start(*command: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr.txt").open("w"),
        text=True,
    )


def finish(process: subprocess.Popen[str], folder: Path) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (folder / "stderr.txt").read_text()
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: list[Any], params: Any) -> Path:
    """A folder LOSS-LAYOUT for each of the cells that two processes have trained, LONG, and a model for `shard`."""
    root = tmp_path_factory.mktemp("together")
    for loss, layout in CELLS:
        lay_out(root / f"{loss}-{layout}", loss, 7, layout, tiny_model, pairs, params)
    lay_out(root / LONG, "ipo", 20, "packed", tiny_model, pairs, params)
    work = [f"train={folder}" for folder in root.iterdir()]
    shutil.copytree(tiny_model, root / "model")
    finish(start("two_processes", *work, f"shard={root / 'model'}", folder=root), root)
    return root


def curve(folder: Path, column: str) -> list[float]:
    (path,) = (folder / paths.CURVES).iterdir()
    with path.open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def metrics(folder: Path) -> Any:
    (path,) = (folder / paths.TRAIN_METRICS).iterdir()
    return json.loads(path.read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / paths.ADAPTERS).glob("*/adapter_model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("loss", "layout"), CELLS)
def test_two_processes_train_what_one_trains(
    loss: str,
    layout: str,
    together: Path,
    tmp_path: Path,
    tiny_model: Path,
    pairs: list[Any],
    params: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = together / f"{loss}-{layout}"
    one = lay_out(tmp_path / "one", loss, 7, layout, tiny_model, pairs, params)
    monkeypatch.setattr(train_stage, "is_torchelastic_launched", lambda: True)  # or it would launch two
    with chdir(one):
        train_stage.main(f"{loss}-0.3-7")
    assert len(curve(one, "loss")) == 7
    assert curve(one, "reward_margin")[-1] > 0.1
    for column, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("reward_margin", 1e-5), ("reward_accuracy", 1e-6)):
        assert curve(two, column) == pytest.approx(curve(one, column), rel=tolerance, abs=tolerance), column
    assert curve(two, "learning_rate") == curve(one, "learning_rate")
    assert metrics(two)["heldout"] == pytest.approx(metrics(one)["heldout"], rel=1e-4, abs=1e-5)
    expected = adapter(one)
    assert adapter(two).keys() == expected.keys()
    for name, weight in adapter(two).items():
        assert (weight - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    configurations = [next(folder.glob("models/adapters/*/adapter_config.json")) for folder in (one, two)]
    assert configurations[0].read_bytes() == configurations[1].read_bytes()
    (cost,) = (two / paths.TRAIN_COST).iterdir()
    assert json.loads(cost.read_text())["processes"] == 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_layout_sees_whole_weights_where_fsdp_shards_them(layout: str, together: Path, tiny_model: Path) -> None:
    """As accelerate shards the model, head and all; its `prepare` would, but on GPUs alone."""
    model = load_model(tiny_model, "fp32")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight  # a unit of its own
    logps, gradients = torch.load(together / "model" / f"{layout}-no.pt")
    expected, expected_gradients = logps_and_gradients(random_adapter(model), layout)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() < 1e-5 * expected_gradients[name].norm(), name


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fsdp_computes_in_bf16_and_rounds_no_sum_to_it(layout: str, together: Path, tiny_model: Path) -> None:
    logps, gradients = torch.load(together / "model" / f"{layout}-bf16.pt")
    expected, expected_gradients = logps_and_gradients(random_adapter(load_model(tiny_model, "fp32")), layout)
    assert logps.dtype == torch.float32
    assert (logps != logps.bfloat16()).any()
    torch.testing.assert_close(logps, expected, rtol=2e-2, atol=0)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    expected_norm = sum(gradient.square().sum() for gradient in expected_gradients.values()).sqrt()
    assert norm.item() == pytest.approx(expected_norm.item(), rel=0.1)


# Killed.


def wait_for(process: subprocess.Popen[str], folder: Path, sign: Any) -> None:
    while not sign():
        assert process.poll() is None, (folder / "stderr.txt").read_text()
        time.sleep(0.01)


def saved_after(checkpoint: Path) -> bool:
    """Whether a later checkpoint has its seal; a look, since the one before is removed at any moment."""
    seals = checkpoint.parent.glob(f"checkpoint-*/{SEAL}")
    return any(seal.parent.name != checkpoint.name for seal in seals)


@pytest.mark.slow
def test_terminated_then_killed_two_processes_end_with_the_same_bits(
    together: Path, tmp_path: Path, tiny_model: Path, pairs: list[Any], params: Any
) -> None:
    folder = lay_out(tmp_path / "cell", "ipo", 20, "packed", tiny_model, pairs, params)
    stage = ("prefscan", "train", LONG)

    terminated = start(*stage, folder=folder)
    wait_for(terminated, folder, lambda: "/20 [" in (folder / "stderr.txt").read_text().replace("0/20 [", ""))
    processes = psutil.Process(terminated.pid).children(recursive=True)
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait(timeout=60) == 1
    (key,) = (path for path in (folder / paths.CHECKPOINTS / LONG).iterdir() if path.is_dir())
    first, _ = last_checkpoint(key)
    assert first is not None
    update = int(first.name.removeprefix("checkpoint-"))
    sentence = f"prefscan: {LONG}: terminated at update {update} of 20; its checkpoint is kept, and `dvc repro` goes on"
    assert (folder / "stderr.txt").read_text().count(sentence) == 1
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((first / SEAL).read_text())["sha256"])
    assert not any(process.is_running() for process in processes)

    killed = start("two_processes", f"save={folder}", folder=folder)
    wait_for(killed, folder, lambda: saved_after(first))
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    assert f"going on from {first.relative_to(folder)}\n" in killed.communicate()[0]
    assert not (folder / paths.ADAPTERS).exists()

    assert f"{LONG}: going on from {paths.CHECKPOINTS}" in finish(start(*stage, folder=folder), folder)
    whole = together / LONG
    for file in (
        paths.ADAPTERS / LONG / "adapter_model.safetensors",
        paths.CURVES / f"{LONG}.csv",
        paths.HELDOUT_POLICY / f"{LONG}.jsonl",
        paths.TRAIN_METRICS / f"{LONG}.json",
    ):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert not (folder / paths.CHECKPOINTS / LONG).exists()


# The configuration.


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_accelerate_takes_the_shipped_configurations(name: str) -> None:
    path = ROOT / f"conf/train/accelerate/{name}.yaml"
    configuration = load_config_from_file(str(path))
    assert configuration.num_processes == 2
    assert configuration.main_process_port == 0


def test_a_configuration_that_accelerate_refuses_ends_with_one_sentence() -> None:
    configuration = Accelerate(**DDP, main_proces_port=0)
    with pytest.raises(UserError, match=r"^train.accelerate: accelerate refuses it: .* unknown keys \(\['main_proces"):
        launch(configuration, "prefscan", "train", LONG)
