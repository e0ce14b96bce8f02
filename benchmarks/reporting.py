"""The report stage on a sweep of the study's size, from made-up metrics: PYTHONPATH=src python benchmarks/reporting.py

54 cells and the base, 80 questions × 2 turns each: it prints the seconds of `prefscan.report` in a process of its own,
bootstraps, charts and pages included, beside those of the same stage on 2 cells, which are its fixed cost.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from configuration import composed
from prefscan.common.config import load
from prefscan.common.io import write_json, write_jsonl, write_text
from prefscan.judging.judge import mode_of
from prefscan.judging.mtbench import Judged, scores

ROOT = Path(__file__).parents[1]
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
STUDY = ["+experiment=openhermes", "judge=local"]
TWO_CELLS = [*STUDY, "sweep.loss='sigmoid,ipo'", "sweep.beta=''", "sweep.steps=''"]


def spanned(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def write_sweep(root: Path, overrides: list[str], questions: int) -> int:
    """params.yaml and made-up metrics of all its cells, in the stages' formats; returns the number of cells."""
    write_text(root / "params.yaml", OmegaConf.to_yaml(composed(*overrides), resolve=True))
    params, draw = load(root / "params.yaml"), random.Random(0)
    category = {81 + n: CATEGORIES[n * len(CATEGORIES) // questions] for n in range(questions)}
    rows = [{"question_id": n, "category": name, "turns": ["A question?", "Another?"]} for n, name in category.items()]
    write_jsonl(root / "data/questions/question.jsonl", rows)
    write_json(root / "metrics/prepare.json", {"rows": 12859, "train": 12359, "heldout": 500, "dropped": {"empty": 0}})
    ranked = spanned("auc", 0.7, 0.1) | spanned("margin", 1.0, 0.5)
    check = {"questions": 30, "power": 0.9, "swapped": ranked, "truncated": ranked}
    write_json(root / "metrics/judge.json", {"judge": "made up", "questions": 30, "true_auc": 0.8, "all": check})
    for key in ("base", *(cell.key for cell in params.grid.cells)):
        judgements = [
            {
                "question_id": n,
                "model": key,
                "turn": turn,
                "sample": 0,
                "score": draw.randint(1, 10),
                "judgment": "words " * 150,
            }
            for n in category
            for turn in (1, 2)
        ]
        write_jsonl(root / f"data/mt_bench/model_judgment/cells/{key}.jsonl", judgements)
        answers = [
            {"question_id": n, "choices": [{"turns": ["words " * 200] * 2, "tokens": [draw.randint(50, 900), 300]}]}
            for n in category
        ]
        write_jsonl(root / f"data/mt_bench/model_answer/{key}.jsonl", answers)
        scored = scores(Judged(judgements, category, []), mode_of(params.judge))
        write_json(root / f"metrics/mtbench/{key}.json", scored | {"usd": 0.0})
        write_json(root / f"metrics/cost/answer/{key}.json", {"seconds": 60.0, "tokens_per_second": 1000.0})
        answered: dict[str, Any] = {"share_truncated": 0.0, "mean_tokens": 300.0 + draw.random(), "repetition": 0.01}
        if key != "base":
            write_cell(root, key, draw)
            answered["divergence"] = spanned("per_reply", draw.uniform(1, 20), 1.0)
        write_json(root / f"metrics/answer/{key}.json", answered)
    return len(params.grid.cells)


def write_cell(root: Path, key: str, draw: random.Random) -> None:
    """What a tuned cell has and the base has not."""
    heldout = spanned("accuracy", draw.uniform(0.5, 0.9), 0.05) | spanned("margin", draw.uniform(0, 9), 1.0)
    heldout |= spanned("loss_change", draw.uniform(-0.2, 0.1), 0.05)
    write_json(
        root / f"metrics/train/{key}.json", {"heldout": heldout | {"chosen_shift": -1.0, "rejected_shift": -4.0}}
    )
    cost = {"seconds": 900.0, "tokens_per_second": 4000.0, "peak_memory_gib": 30.0}
    write_json(root / f"metrics/cost/train/{key}.json", cost)
    merge = {"margin_kept": 1.0, "weights_changed": 0.9, "pairs": 4}
    write_json(root / f"metrics/merge/{key}.json", merge | spanned("margin_answering", draw.uniform(0, 9), 1.0))
    steps = range(1, int(key.rsplit("-", 1)[1]) + 1)
    lines = (f"{step},{draw.random()},{draw.random()},0.5,1.0,0.001" for step in steps)
    header = "step,loss,reward_margin,reward_accuracy,grad_norm,learning_rate"
    write_text(root / f"metrics/curves/{key}.csv", "\n".join([header, *lines, ""]))


def measure(overrides: list[str], questions: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        cells = write_sweep(root, overrides, questions)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "prefscan", "report"], cwd=root, env=environment, check=True)
        seconds = time.perf_counter() - begin
        pages = {path.name: path.stat().st_size for path in (root / "reports").glob("*.html")}
        return {"cells": cells, "judgements": 2 * questions, "seconds": round(seconds, 1), "bytes": pages}


def main() -> None:
    argparse.ArgumentParser(description="The report stage on a sweep of the study's size.").parse_args()
    study, small = measure(STUDY, 80), measure(TWO_CELLS, 80)
    print(json.dumps({"study": study, "two_cells": small, "ratio": study["seconds"] / small["seconds"]}, indent=2))


if __name__ == "__main__":
    main()
