"""A killed cell goes on from its last checkpoint and ends with the same bits; no other checkpoint is ever used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from prefscan.common import fingerprint as keys
from prefscan.common import paths
from prefscan.common.config import Lora, load
from prefscan.common.errors import UserError
from prefscan.common.fingerprint import stage_fingerprint
from prefscan.training import checkpoints
from prefscan.training.checkpoints import SEAL, Saving, checkpoint_folder, last_checkpoint
from train_data import QUIET, Killed, changed, run_train, with_recipe, write_inputs

ROOT = Path(__file__).parents[2]
CELL = "ipo-0.3-7"
ADAPTER = paths.ADAPTERS / CELL / "adapter_model.safetensors"
KEPT = "its checkpoint is kept, and `dvc repro` goes on from it"


Lay = Callable[..., None]


@pytest.fixture
def lay_out(in_tmp: Path, tiny_model: Path, pairs: list[dict[str, Any]], params: Any) -> Lay:
    """Put in place what dvc has before `prefscan train` runs; keywords override the section `train`."""

    def write(steps: int = 7, base: Path = tiny_model, **changes: Any) -> None:
        lora = Lora(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"])
        sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        section = {"lora": lora, "disable_dropout": False, **sizes}
        train, _ = changed(params.train, QUIET, **section | changes)
        recipe = {"loss": "ipo", "beta": 0.3, "steps": steps}
        write_inputs(in_tmp, base, pairs[:16], pairs[16:], with_recipe(params, train, seed=11, **recipe))

    return write


def change(key: str, value: Any) -> None:
    """Change a value of params.yaml, and the grid with it."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    *parents, last = key.split(".")
    section = raw
    for part in parents:
        section = section[part]
    section[last] = value
    if key in raw["grid"]:
        raw["grid"][key] = [value]
    Path("params.yaml").write_text(yaml.safe_dump(raw))


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every update is followed by a save."""
    monkeypatch.setattr(checkpoints, "FIRST", 0)
    monkeypatch.setattr(checkpoints, "WAIT", 0)
    return monkeypatch


def result(key: str = CELL) -> tuple[bytes, str, Any]:
    """What the stage wrote, but for the cost."""
    metrics = json.loads((paths.TRAIN_METRICS / f"{key}.json").read_text())
    adapter = (paths.ADAPTERS / key / "adapter_model.safetensors").read_bytes()
    return adapter, (paths.CURVES / f"{key}.csv").read_text(), metrics


def saved() -> list[Path]:
    return sorted(paths.CHECKPOINTS.glob("*/*/checkpoint-*"))


# Going on.


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_from_any_update_a_cell_ends_with_the_same_bits(
    lay_out: Lay, saving: pytest.MonkeyPatch, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout, over three epochs of 6 micro-batches, the last update of each epoch from fewer."""
    lay_out(layout=layout)
    run_train(CELL)
    expected = result()
    for update in range(1, 7):
        with pytest.raises(Killed):
            run_train(CELL, kill_at=update)
        (checkpoint,) = saved()
        assert checkpoint.name == f"checkpoint-{update}"
        capsys.readouterr()
        run_train(CELL)
        assert f"{CELL}: going on from {checkpoint}\n" in capsys.readouterr().out
        assert result() == expected
    assert not (paths.CHECKPOINTS / CELL).exists()


def test_a_4_bit_cell_goes_on_with_the_same_bits(lay_out: Lay, saving: pytest.MonkeyPatch, wide_model: Path) -> None:
    lay_out(base=wide_model, bnb_4bit_quant_type="nf4", dtype="bf16")
    run_train(CELL)
    expected = result()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=3)
    run_train(CELL)
    assert result() == expected


def test_kill_9_and_run_again(lay_out: Lay) -> None:
    lay_out(steps=30)
    key = "ipo-0.3-30"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    save_always = """
import sys
from prefscan.stages import train
from prefscan.training import checkpoints
checkpoints.FIRST = checkpoints.WAIT = 0
train.main(sys.argv[1])
"""
    killed = subprocess.Popen([sys.executable, "-c", save_always, key], env=environment)
    while not list(paths.CHECKPOINTS.glob(f"{key}/*/checkpoint-*/{SEAL}")):
        assert killed.poll() is None, "the stage ended before its first checkpoint"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (paths.ADAPTERS / key).exists()
    stage = [sys.executable, "-m", "prefscan", "train", key]
    again = subprocess.run(stage, env=environment, check=True, capture_output=True, text=True)
    assert f"{key}: going on from {paths.CHECKPOINTS / key}" in again.stdout
    resumed = result(key)
    run_train(key)
    assert resumed == result(key)


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_saves_after_the_update_and_a_second_one_does_not_wait(lay_out: Lay, signals: int) -> None:
    """Within the first half minute, when no save is due. The update waits for the signals, so that they meet it."""
    lay_out(steps=9)
    key = "ipo-0.3-9"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    wait = """
import sys
from prefscan.common.errors import run
from prefscan.stages import train
held, trainer = [], train.PairTrainer
compute = trainer._compute_loss
def hold(self, *arguments):
    if self.state.global_step == 4 and not held:
        held.append(print("in update 5", flush=True))
        sys.stdin.readline()
    return compute(self, *arguments)
trainer._compute_loss = hold
run("train", lambda: train.main(sys.argv[1]))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", wait, key], env=environment, text=True, **pipes) as stage:
        assert any(line == "in update 5\n" for line in stage.stdout)
        for _ in range(signals):
            stage.send_signal(signal.SIGTERM)
            time.sleep(0.5)  # signals that are pending at once are one
        if signals == 2:
            assert stage.wait(timeout=60) == -signal.SIGTERM
            assert not saved()
            return
        _, errors = stage.communicate("\n", timeout=60)
        assert stage.returncode == 1
    sentence = (
        f"prefscan: {key}: terminated at update 5 of 9; its checkpoint is kept, and `dvc repro` goes on from it\n"
    )
    assert errors.endswith(sentence)
    (checkpoint,) = saved()
    assert checkpoint.name == "checkpoint-5"
    assert last_checkpoint(checkpoint.parent)[0] == checkpoint
    assert not (paths.ADAPTERS / key).exists()
    again = subprocess.run(
        [sys.executable, "-m", "prefscan", "train", key], env=environment, check=True, capture_output=True, text=True
    )
    assert f"{key}: going on from {checkpoint}\n" in again.stdout
    resumed = result(key)
    run_train(key)
    assert resumed == result(key)


@pytest.mark.parametrize(
    ("update", "end"),
    [(6, "its checkpoint is kept, and `dvc repro` goes on from it"), (7, "`dvc repro` begins it again")],
)
def test_sigterm_in_the_last_update_saves_nothing(
    lay_out: Lay, update: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing left to train from it; and a handler that was there before is there again."""
    lay_out()
    before = signal.getsignal(signal.SIGTERM)
    on_step_end = Saving.on_step_end

    def signalled(self: Saving, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == update:
            signal.raise_signal(signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Saving, "on_step_end", signalled)
    with pytest.raises(UserError, match=rf"^{CELL}: terminated at update {update} of 7; {end}$"):
        run_train(CELL)
    assert len(saved()) == (update < 7)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_seconds_before_the_kill_count(lay_out: Lay, saving: pytest.MonkeyPatch) -> None:
    lay_out()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=3)
    (checkpoint,) = saved()
    seal = json.loads((checkpoint / SEAL).read_text())
    assert 0 < seal["seconds"] < 600
    (checkpoint / SEAL).write_text(json.dumps(seal | {"seconds": 5000.0}))
    with pytest.raises(Killed):
        run_train(CELL, kill_at=5)
    assert last_checkpoint(saved()[0].parent)[1] > 5000
    run_train(CELL)
    assert json.loads((paths.TRAIN_COST / f"{CELL}.json").read_text())["seconds"] > 5000


def test_a_checkpoint_holds_the_adapter_and_not_the_base(lay_out: Lay, saving: pytest.MonkeyPatch) -> None:
    lay_out()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=2)
    (checkpoint,) = saved()
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora" in name for name in load_file(checkpoint / "adapter_model.safetensors"))


# Never another checkpoint.


def test_a_checkpoint_of_another_seed_is_not_used(
    lay_out: Lay, saving: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out()
    run_train(CELL)
    first = result()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=3)
    (left,) = saved()
    change("seed", 12)
    run_train(CELL)
    assert "going on" not in capsys.readouterr().out
    assert not left.exists()
    second = result()
    assert second[0] != first[0]
    run_train(CELL)
    assert result() == second


def key_now() -> str:
    return stage_fingerprint("train", load().recipe.key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 12),
        ("beta", 0.4),
        ("loss", "sigmoid"),
        ("steps", 6),
        ("train.learning_rate", 2e-3),
        ("train.lora.r", 8),
    ],
)
def test_other_parameters_are_another_key(lay_out: Lay, key: str, value: Any) -> None:
    lay_out()
    before = key_now()
    change(key, value)
    assert key_now() != before


def test_a_hyperparameter_is_in_the_key_of_its_own_loss_alone(lay_out: Lay) -> None:
    lay_out()
    change("loss", "simpo")
    before = key_now()
    change("losses.cpo.alpha", 0.5)
    assert key_now() == before
    change("losses.simpo.gamma", 0.9)
    assert key_now() != before


@pytest.mark.parametrize(
    "path", [*paths.SPLITS["train"], *paths.SPLITS["heldout"], paths.BASE / "config.json"], ids=str
)
def test_other_data_is_another_key(lay_out: Lay, path: Path) -> None:
    lay_out()
    before = key_now()
    path.write_text(path.read_text() + "\n")
    assert key_now() != before


def test_other_weights_are_another_key(lay_out: Lay) -> None:
    lay_out()
    before = key_now()
    path = paths.BASE / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert key_now() != before


@pytest.mark.parametrize(
    "name", ["training/losses.py", "stages/train.py", "training/checkpoints.py", "logprobs/packed.py"]
)
def test_other_code_is_another_key(lay_out: Lay, name: str) -> None:
    lay_out()
    before = key_now()
    Path("src").unlink()
    copy = Path(shutil.copytree(ROOT / "src", "src")) / "prefscan"
    assert key_now() == before
    (copy / "reporting/report.py").write_text("# touched\n")
    assert key_now() == before
    (copy / name).write_text((copy / name).read_text() + "\n# touched\n")
    assert key_now() != before


@pytest.mark.parametrize("name", ["torch", "transformers", "trl", "peft"])
def test_another_library_is_another_key(lay_out: Lay, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lay_out()
    before = key_now()
    monkeypatch.setattr(keys, "version", lambda asked: "0" if asked == name else metadata.version(asked))
    assert key_now() != before


def test_another_number_of_threads_is_another_key(lay_out: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out()
    before = key_now()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert torch.cuda.is_available() or key_now() != before


@pytest.mark.parametrize(("key", "value"), [("report_to", "wandb"), ("gradient_checkpointing", True)])
def test_what_changes_no_result_is_no_part_of_the_key(lay_out: Lay, key: str, value: Any) -> None:
    lay_out()
    before = key_now()
    change(f"runtime.{key}", value)
    assert key_now() == before


def test_checkpoints_of_a_cells_other_results_are_removed(lay_out: Lay) -> None:
    lay_out()
    other, neighbour = paths.CHECKPOINTS / CELL / "0", paths.CHECKPOINTS / "ipo-0.5-7" / "0"
    for folder in (other, neighbour):
        (folder / "checkpoint-1").mkdir(parents=True)
    folder = checkpoint_folder(CELL)
    assert folder.parent == other.parent
    assert not other.exists()
    assert neighbour.exists()


def test_two_processes_do_not_train_one_cell_at_once(lay_out: Lay) -> None:
    lay_out()
    paths.CHECKPOINTS.mkdir(parents=True)
    path = paths.CHECKPOINTS / f"{CELL}.lock"
    hold = (
        f"import fcntl; file = open({str(path)!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"^another process is training {CELL} here; end it, and run `dvc repro`"):
            run_train(CELL)
    run_train(CELL)
    assert ADAPTER.exists()


# Whole checkpoints alone.


def test_a_save_without_its_seal_is_not_used(
    lay_out: Lay, saving: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out()
    run_train(CELL)
    expected = result()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=4, before_seal=True)
    assert [path.name for path in saved()] == ["checkpoint-3", "checkpoint-4"]
    capsys.readouterr()
    with pytest.raises(Killed):
        run_train(CELL, kill_at=4)  # writes over what it left
    assert "/checkpoint-3\n" in capsys.readouterr().out
    run_train(CELL)
    assert "/checkpoint-4\n" in capsys.readouterr().out
    assert result() == expected


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two sealed checkpoints; the path of the last."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).write_text(f"{name} of {step}")
        (folder / "global_step").mkdir()  # DeepSpeed's shards
        (folder / "global_step/shard.pt").write_text(f"shard of {step}")
        checkpoints.write_json(folder / SEAL, {"seconds": float(step), "sha256": checkpoints.digests(folder)})
    return folder


def test_the_last_whole_checkpoint_is_found(checkpoint: Path, tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) == (checkpoint, 10.0)
    assert last_checkpoint(tmp_path / "elsewhere") == (None, 0.0)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "global_step/shard.pt",
        SEAL,
    ],
)
@pytest.mark.parametrize("harm", ["truncated", "empty", "gone", "altered"])
def test_a_harmed_checkpoint_is_passed_over(checkpoint: Path, tmp_path: Path, name: str, harm: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-3], "empty": b"", "altered": content[:-3] + b"abc"}[harm])
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-9", 9.0)


def test_a_checkpoint_on_a_bad_sector_is_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "optimizer.pt"
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # whose first page no process can read
    with pytest.raises(OSError, match="Input/output error"):
        shard.read_bytes()
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-9", 9.0)


# When.


def test_saving_waits_half_a_minute_and_then_a_hundred_times_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    args = type("Arguments", (), {"output_dir": str(tmp_path)})
    state = type("State", (), {"global_step": 0, "max_steps": 100})
    control = type("Control", (), {"should_save": False})
    callback = Saving(7.0)
    saves = []
    for step in range(1, 101):
        state.global_step = step
        clock += 10
        callback.on_step_end(args, state, control)
        if control.should_save:
            saves.append(step)
            (tmp_path / f"checkpoint-{step}").mkdir()
            clock += 2
            callback.on_save(args, state, control)
    assert saves == [3, 23, 43, 63, 83]  # after 30 s, then every 200 s
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-83", 7 + 83 * 10 + 4 * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-83"]


def test_nothing_is_saved_after_the_last_update(lay_out: Lay, saving: pytest.MonkeyPatch) -> None:
    lay_out()
    steps = []
    on_save = Saving.on_save
    saving.setattr(Saving, "on_save", lambda *a, **k: (steps.append(a[2].global_step), on_save(*a, **k)))
    run_train(CELL)
    assert steps == [1, 2, 3, 4, 5, 6]
