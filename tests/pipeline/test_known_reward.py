"""The whole way of a known reward at small size: reviews, sampled pairs, training, replies, exact KL, the report."""

import csv
import json
import random
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.workspace import Workspace, make_wheel, stages_run

LETTERS = {1: "abcdefghijklm", 0: "nopqrstuvwxyz"}  # of positive and of negative reviews


def reviews(count: int = 160) -> str:
    """A CSV of reviews whose words are single letters, which a model of bytes can write."""
    rng = random.Random(0)
    lines = [["text", "label"]]
    for i in range(count):
        label = i % 2
        words = [rng.choice(LETTERS[label if rng.random() < 0.8 else 1 - label]) for _ in range(40)]
        lines.append([" ".join(words), str(label)])
    out = StringIO()
    csv.writer(out).writerows(lines)
    return out.getvalue()


def with_reward(work: Workspace, packages: Path) -> None:
    """Give the tiny repository a reward and prompts of its own, and compose its parameters anew."""
    conf = work.folder / "conf"
    source = make_wheel(packages, "tinyreviews", {"tinyreviews/reviews.csv": reviews()})
    reward = yaml.safe_load((conf / "reward/sentiment.yaml").read_text())
    reward |= {"source": source | {"file": "tinyreviews/reviews.csv"}, "excerpt_words": 16, "prompt_words": 4}
    reward |= {"check_share": 0.3, "prompts_share": 0.45}
    (conf / "reward/tiny.yaml").write_text(json.dumps(reward))
    sample = yaml.safe_load((conf / "sample/reviews.yaml").read_text())
    small = {"train_prompts": 18, "eval_prompts": 20, "base_replies": 4, "max_new_tokens": 24, "batch_size": 32}
    sample["sample"] |= small
    sample["evaluate"] = {"replies": 2, "kl_prompts": 8}
    (conf / "sample/tiny.yaml").write_text(f"# @package _global_\n{json.dumps(sample)}")
    overrides = ["reward=tiny", "sample=tiny", "data=sampled", "data.source.min_gap=0.01", "data.heldout_share=0.2"]
    overrides += ["steps=40", "train.learning_rate=0.02", "mtbench=recipe"]
    compose = "import os, sys; from dvc.utils.hydra import compose_and_dump; "
    compose += "compose_and_dump('params.yaml', os.path.abspath('conf'), None, 'config', '', sys.argv[1:])"
    work.run(sys.executable, "-c", compose, *overrides)


@pytest.fixture
def work(fresh: Workspace, environment: dict[str, str], tmp_path: Path) -> Workspace:
    packages = tmp_path / "packages"
    shutil.copytree(environment["PIP_FIND_LINKS"], packages)
    made = Workspace(fresh.copy(tmp_path / "work").folder, environment | {"PIP_FIND_LINKS": str(packages)})
    with_reward(made, packages)
    return made


def rows(work: Workspace, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work.folder / path).read_text().splitlines()]


def test_a_sweep_ends_with_the_losses_compared(work: Workspace) -> None:
    work.dvc("repro")
    summary = work.json("metrics/summary.json")
    assert {"reward", "gain", "kl", "win_rate"} < summary["recipe"].keys()
    reward = work.json("metrics/reward.json")
    assert reward["check"]["excerpts"]["auc"]["value"] > 0.9  # letters tell the two kinds apart
    prompts = {name: {row["prompt"] for row in rows(work, f"data/samples/{name}.jsonl")} for name in ("train", "eval")}
    assert not prompts["train"] & prompts["eval"]
    pairs = [*rows(work, "data/pairs/train.jsonl"), *rows(work, "data/pairs/heldout.jsonl")]
    assert all(pair["gap"] >= 0.01 for pair in pairs)
    text = (work.folder / "reports/report.md").read_text()
    assert "P(positive)" in text
    assert text.index("## The losses") < text.index("## MT-Bench")
    kls = [reply["kl"] for row in rows(work, "data/replies/sigmoid-0.1-40.jsonl") for reply in row["replies"]]
    assert sum(kl is not None for kl in kls) == 8
    assert all(kl >= 0 for kl in kls if kl is not None)
    assert stages_run(work.dvc("repro", "--dry")) == []


def trained_reward(work: Workspace, reverse: bool) -> dict[str, Any]:
    """metrics/evaluate of a cell that is trained on the sampled pairs, or on them with chosen and rejected swapped."""
    for side in ("train", "heldout"):
        path = work.folder / f"data/pairs/{side}.jsonl"
        pairs = rows(work, f"data/pairs/{side}.jsonl")
        if reverse:
            for pair in pairs:
                for name in ("", "_ids"):
                    ours, theirs = f"chosen{name}", f"rejected{name}"
                    pair[ours], pair[theirs] = pair[theirs], pair[ours]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        work.run(sys.executable, "-m", "prefscan", "reference", side)
    for stage in ("train", "merge", "evaluate"):
        work.run(sys.executable, "-m", "prefscan", stage, "sigmoid-0.1-40")
    return dict(work.json("metrics/evaluate/sigmoid-0.1-40.json"))


def test_what_is_trained_is_what_is_measured(work: Workspace) -> None:
    """Reversed labels lower the reward by about as much as right ones raise it."""
    work.dvc("repro", "prepare", "sample@eval")
    work.environment["PYTHONPATH"] = str(work.folder / "src")
    right = trained_reward(work, reverse=False)
    wrong = trained_reward(work, reverse=True)
    assert right["gain_low"] > 0
    assert wrong["gain_high"] < 0
    assert right["win_rate"] > 0.5 > wrong["win_rate"]
