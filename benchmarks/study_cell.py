"""Seconds and memory of each stage of one cell of the 7B study, on a GPU.

    dvc repro prepare fetch@questions && PYTHONPATH=src python benchmarks/study_cell.py --json runs/study_cell.json

Mistral-7B's architecture with random weights, as in train_step.py, and the parameters of `+experiment=openhermes`, but
for the pairs, which are those of the embedded default, fewer updates without warm-up, and shorter answers. Each stage
runs as in dvc.yaml, in a process of its own, without DVC, which adds seconds. Random weights rarely end a turn, so an
answer has nearly the most tokens: what a real model's answers take at the worst. They give no verdict either: no
judging here. A stage's line is printed, and the file written, as it ends.

Needs a CUDA GPU with 24 GB, 30 GB of main memory where the merge does not fit on the GPU, and 15 GB of disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from configuration import composed
from prefscan.common.config import Cell
from prefscan.common.errors import UserError, run
from prefscan.common.io import read_json, write_json, write_text
from prefscan.common.paths import ANSWER_COST, BASE, QUESTIONS, SPLITS, TRAIN_COST, TRAIN_PAIRS
from prefscan.models.loading import load_tokenizer
from train_step import base_model, machine

ROOT = Path(__file__).resolve().parents[1]
COST = {"train": TRAIN_COST, "answer": ANSWER_COST}


def parameters(options: argparse.Namespace, rows: str) -> tuple[str, str]:
    """params.yaml of the study with one cell, answering so many conversations at once, and the cell's key."""
    overrides = ["+experiment=openhermes", "sweep=none", f"steps={options.steps}", "beta=0.1", "runtime.report_to=none"]
    overrides += ["train.warmup_steps=0", f"answer.max_new_tokens={options.max_new_tokens}"]
    overrides += [f"answer.batch_size={rows}"]
    params = composed(*overrides)
    return OmegaConf.to_yaml(params, resolve=True), Cell(loss=params.loss, beta=params.beta, steps=params.steps).key


def peak_of_gpu(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of a stage, and GiB of the GPU at most, beyond what was in use before."""
    before = torch.cuda.mem_get_info()[0]
    least, started = before, time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=sys.stderr) as stage:
        while stage.poll() is None:
            least = min(least, torch.cuda.mem_get_info()[0])
            time.sleep(0.2)
    if stage.returncode:
        raise UserError(f"{' '.join(command[2:])} failed; its error stands above")
    return time.perf_counter() - started, (before - least) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="A cell of the 7B study, stage by stage; the module's text says how.")
    parser.add_argument("--steps", type=int, default=20, help="updates of 16 pairs (default: 20)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each turn (default: 256)")
    parser.add_argument("--rows", default="auto", help="conversations at once, one answer stage each, as 40,80")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    rows = options.rows.split(",")
    _, key = parameters(options, rows[0])
    result: dict[str, Any] = {"machine": machine(), "cell": key, "stages": {}}
    splits = [(f"reference {split}", rows[0]) for split in SPLITS]
    stages = [*splits, ("train", rows[0]), ("merge", rows[0]), *(("answer", count) for count in rows)]
    print(f"{result['machine']['gpu']}, {key}, answers of {options.max_new_tokens} tokens a turn", flush=True)
    vocabulary = len(load_tokenizer(BASE))
    with tempfile.TemporaryDirectory() as place, base_model("mistral-7b", vocabulary) as weights:
        folder = Path(place)
        for path in (TRAIN_PAIRS.parent, QUESTIONS):
            shutil.copytree(path, folder / path)
        for name in ("dvc.yaml", "src"):  # they say what a checkpoint depends on
            (folder / name).symlink_to(ROOT / name)
        (folder / BASE).parent.mkdir(parents=True)
        load_tokenizer(BASE).save_pretrained(weights)
        (folder / BASE).symlink_to(weights)
        for stage, count in stages:
            write_text(folder / "params.yaml", parameters(options, count)[0])
            module, *words = stage.split()
            seconds, peak = peak_of_gpu([sys.executable, "-m", "prefscan", module, *(words or [key])], folder)
            name = f"answer, {count} at once" if stage == "answer" else stage
            result["stages"][name] = {"seconds": seconds, "gpu_gib": peak}
            speed = ""
            if stage in COST:
                cost = read_json(folder / COST[stage] / f"{key}.json")
                result["stages"][name] |= {"within": cost["seconds"], "tokens_per_second": cost["tokens_per_second"]}
                speed = f", {cost['tokens_per_second']:,.0f} tokens/s in {cost['seconds']:.0f} of them"
            print(f"{name}: {seconds:.0f} s, {peak:.1f} GiB of the GPU{speed}", flush=True)
            if options.json:
                write_json(options.json, result)


if __name__ == "__main__":
    run("study_cell", main)
