"""The comparison of training steps, run as it is on the tiny model; no clock is compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import train_step
from mtbench_data import ROOT
from prefscan.common.errors import UserError
from tiny import random_pairs
from train_step import ORCA, Step, check_agreement, make_pairs, settings


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def workspace(prepared: Path) -> Path:
    """With the committed configuration."""
    (prepared / "conf").symlink_to(ROOT / "conf")
    return prepared


@pytest.mark.slow
def test_all_variants_compute_the_same(workspace: Path) -> None:
    done = run(workspace, "--repetitions", "1", "--micro-batch", "2", "--lengths", "real", "--json", "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((workspace / "result.json").read_text())
    (measured,) = result["runs"]
    assert (measured["lengths"], measured["micro_batch"], measured["pairs_a_step"]) == ("real", 2, 4)
    variants = measured["variants"]
    assert list(variants) == ["stock", "precomputed", "fast"]
    tokens = {step["tokens"] for variant in variants.values() for step in variant["steps"]}
    mean = measured["mean_tokens"]
    assert tokens == {round(4 * (2 * mean["prompt"] + mean["chosen"] + mean["rejected"]))}
    assert variants["fast"]["steps"][0]["positions"] < tokens.pop() <= variants["stock"]["steps"][0]["positions"]
    for variant in variants.values():
        assert len(variant["steps"]) == 1
        assert variant["loss_difference"] < 1e-4
        assert variant["gradient_difference"] < 1e-3
        assert variant["peak_memory_gib"] > 0
        assert abs(variant["steps"][0]["loss"] - 0.693147) > 1e-5  # else a tie would hide a wrong path
    assert variants["fast"]["ratio_to_fast"] == {"median": 1, "min": 1, "max": 1}
    for name in variants:
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "3"], "--micro-batch: 3 does not divide the 4 pairs"),
        (["--shape", "mistral-7b"], "--shape: mistral-7b needs a CUDA GPU"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    if "mistral-7b" in arguments and train_step.torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "argv", ["train_step", "--micro-batch", "1", *arguments])
    with pytest.raises(UserError, match=f"^{message}"):
        train_step.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 0.5002}, "the loss of fast is"),
        ({"loss": float("nan")}, "the loss of fast is"),
        ({"gradient_norm": 1.1}, "the gradient norm of fast is"),
        ({"tokens": 9}, "fast ran 9 tokens"),
    ],
)
def test_a_fast_wrong_path_is_no_result(change: dict[str, float], message: str) -> None:
    right: dict[str, Any] = {"seconds": 1.0, "loss": 0.5, "gradient_norm": 1.0, "tokens": 10, "positions": 10}
    check_agreement({"stock": Step(**right), "fast": Step(**right)}, "fp32")
    with pytest.raises(UserError, match=message):
        check_agreement({"stock": Step(**right), "fast": Step(**right | change)}, "fp32")


@pytest.mark.parametrize("count", [8, 24])
def test_orca_lengths_have_the_averages_and_a_spread(count: int) -> None:
    made = make_pairs(random_pairs([(5, 3, 4), (2, 7, 6)]), "orca", count, 50)
    assert len(made) == count
    for key, mean in ORCA.items():
        lengths = [len(pair[key]) for pair in made]
        assert fmean(lengths) == pytest.approx(mean, abs=0.5)
        assert max(lengths) > 1.5 * mean > 1.5 * 1.5 * min(lengths)
        assert all(token < 50 for pair in made for token in pair[key])
    assert made == make_pairs(random_pairs([(5, 3, 4), (2, 7, 6)]), "orca", count, 50)


def test_real_pairs_stay_as_they_are_and_start_again() -> None:
    source = random_pairs([(5, 3, 4), (2, 7, 6), (1, 1, 2)])
    made = make_pairs(source, "real", 6, 64)
    assert made[:3] == made[3:]
    assert sorted(made[:3], key=str) == sorted(({key: pair[key] for key in ORCA} for pair in source), key=str)


@pytest.mark.parametrize(("shape", "pairs"), [("smollm2", 4), ("mistral-7b", 16)])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_an_update_has_as_many_pairs_at_every_micro_batch(
    shape: str, pairs: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    fast = settings(shape, micro_batch, "fast", "stock")
    train = fast.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps * micro_batch) == (micro_batch, pairs)
    assert not fast.runtime.gradient_checkpointing
    assert settings(shape, micro_batch, "stock", "stock").runtime.gradient_checkpointing
