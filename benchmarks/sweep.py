"""The whole sweep of params.yaml: prefscan's pipeline against the study's loop, in one run.

    PYTHONPATH=src python benchmarks/sweep.py --json runs/sweep.json
    PYTHONPATH=src python benchmarks/sweep.py --cells 1    # the loop's first cell only, times the number of cells

Both start in a fresh clone of HEAD with an empty DVC cache, after `dvc repro fetch`: neither side's time has the fetch
in it. prefscan's side is what `make sweep` runs, the launcher, everything in it: preparation, the reference pass,
held-out evaluation, the base's own answers and scores, merge checks and the report. The study's loop, on as many
threads as torch takes, is a process a cell that imports, loads, trains with stock TRL's DPOTrainer and a reference pass
at every step, merges and saves, loads the merged model, answers one question at a time with transformers' own sampling,
and judges each turn. It has the same updates, pairs, seed, questions, token limit and judge, makes no held-out
evaluation and does not answer with the base: less work than `make sweep` does.

TRL 1.16 has no `kto_pair` and no `ipo_sum`: the loop trains these cells with `sigmoid` and `ipo`, which make the same
forward, reference and backward passes and differ in arithmetic on one number a pair. A grid with a loss of another
trainer of TRL's, `kto`, `simpo`, `orpo` or `cpo`, is refused: those make other passes. Temperatures are FastChat's; the
random draws of the two sides differ, so answers may end at other lengths: the number of generated tokens is reported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from prefscan.common.config import Cell, LocalJudge, Params, load
from prefscan.common.errors import UserError
from prefscan.common.errors import run as run_command
from prefscan.common.io import read_json, read_jsonl, write_json
from prefscan.common.paths import ANSWER_METRICS, BASE, QUESTIONS, TRAIN_PAIRS

ROOT = Path(__file__).parents[1]
STAND_IN = {"kto_pair": "sigmoid", "ipo_sum": "ipo"}  # losses that stock TRL 1.16 lacks
OTHER_TRAINERS = ("kto", "simpo", "orpo", "cpo")  # losses that its DPOTrainer lacks, and others of its trainers have
PHASES = ("start", "load", "train", "merge", "answer", "judge")


@contextmanager
def phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def train_stock(cell: Cell, params: Params, model: Any, tokenizer: Any) -> Any:
    """Stock TRL's trainer after the cell's updates, on the tokens that prepare wrote."""
    from datasets import Dataset

    from prefscan.training.lora import lora_config
    from prefscan.training.trainer import CellSettings, TokenisedTrainer, training_arguments
    from train_step import ORCA

    pairs = read_jsonl(TRAIN_PAIRS)
    train = params.train.model_copy(update={"layout": "padded"})
    settings = replace(
        CellSettings.of(params, cell.key),
        train=train,
        runtime=params.runtime.model_copy(update={"report_to": "none"}),
    )
    updates = train.updates(cell.steps, len(pairs))
    arguments = training_arguments(settings, updates, recompute=False, checkpoints=Path("runs/study"))
    arguments.loss_type = [STAND_IN.get(cell.loss, cell.loss)]
    options = dict(settings.options)
    arguments.label_smoothing = options.get("label_smoothing", 0.0)
    arguments.discopop_tau = options.get("tau", arguments.discopop_tau)
    trainer = TokenisedTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{key: pair[key] for key in ORCA} for pair in pairs]),
        processing_class=tokenizer,
        peft_config=lora_config(train),
    )
    trainer.train()
    return trainer


def answer_one_at_a_time(model: Any, tokenizer: Any, params: Params, model_id: str) -> tuple[list[Any], int]:
    """Answers in FastChat's format, a question and a turn after the other, and how many tokens were generated."""
    import torch

    from answers import one_at_a_time
    from prefscan.judging.fastchat import select_questions

    records, generated = [], 0
    torch.manual_seed(params.seed)
    for question in select_questions(read_jsonl(QUESTIONS / "question.jsonl"), params.answer.questions):
        replies = one_at_a_time(model, tokenizer, question, params.answer.max_new_tokens)
        generated += sum(len(reply.tokens) for reply in replies)
        record = {"question_id": question["question_id"], "model_id": model_id}
        records.append(record | {"choices": [{"index": 0, "turns": [reply.text for reply in replies]}]})
    return records, generated


def study_cell(key: str) -> dict[str, Any]:
    """One cell of the study's loop, in this process and working directory."""
    params = load()
    cell = params.cell(key)
    seconds: dict[str, float] = {}
    from prefscan.judging.mtbench import judge_answers
    from prefscan.logprobs.reference import load_base
    from prefscan.models.loading import DTYPES, load_model, load_tokenizer

    with phase(seconds, "load"):
        model, tokenizer = load_base(params.train), load_tokenizer(BASE)
    with phase(seconds, "train"):
        trainer = train_stock(cell, params, model, tokenizer)
    with tempfile.TemporaryDirectory() as merged:
        with phase(seconds, "merge"):
            trainer.model.merge_and_unload().to(DTYPES[params.merge.dtype]).save_pretrained(merged)
            tokenizer.save_pretrained(merged)
        with phase(seconds, "answer"):
            model = load_model(Path(merged), params.answer.dtype).eval()
            answers, generated = answer_one_at_a_time(model, tokenizer, params, key)
    with phase(seconds, "judge"):
        scores = [judgement["score"] for judgement in judge_answers(key, answers, params.judge).rows]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "cell": key,
        "trained_as": trainer.args.loss_type[0],
        "updates": trainer.state.global_step,
        "losses": losses,
        "generated_tokens": generated,
        "judged_turns": len(scores),
        "score": fmean(scores),
        "seconds": seconds,
    }


def environment(folder: Path) -> dict[str, str]:
    """The clone's own code, not that of an installed one; this Python's commands first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(folder / "src"), "PATH": path}


def study_loop(folder: Path, keys: list[str]) -> list[dict[str, Any]]:
    """The cells one after the other, each in a process of its own, with the seconds of each phase."""
    cells = []
    for key in keys:
        with tempfile.TemporaryDirectory() as results:
            result = Path(results) / "cell.json"
            words = ["--study-cell", key, "--json", str(result)]
            started = time.perf_counter()
            done = subprocess.run([sys.executable, __file__, *words], cwd=folder, env=environment(folder))
            total = time.perf_counter() - started
            if done.returncode:
                raise UserError(f"the study's loop failed in cell {key}; its error stands above")
            cell = json.loads(result.read_text())
        # Whatever the phases do not have: the interpreter, imports and the end of the process.
        cell["seconds"] = {"start": total - sum(cell["seconds"].values()), **cell["seconds"]}
        cells.append(cell | {"total_seconds": total})
    return cells


def run(folder: Path, *module: str) -> float:
    """Seconds that a module took, given with its arguments."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *module], cwd=folder, env=environment(folder))
    if done.returncode:
        raise UserError(f"`python -m {' '.join(module)}` failed in the clone; its error stands above")
    return time.perf_counter() - started


@contextmanager
def fetched_clone(repository: Path) -> Iterator[Path]:
    """A fresh clone of the repository's HEAD with an empty cache, in which only the fetch has run."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True)  # noqa: S607
        shutil.rmtree(folder / ".dvc/cache", ignore_errors=True)
        run(folder, "dvc", "repro", "fetch")
        yield folder


def compare(repository: Path, limit: int | None) -> dict[str, Any]:
    """Both sides in one clone; the loop over the first `limit` cells, or all."""
    params = load(repository / "params.yaml")
    if not isinstance(params.judge, LocalJudge):
        raise UserError(f"judge.kind: {params.judge.kind!r} would be paid for twice; set the local judge")
    if others := sorted({cell.loss for cell in params.grid.cells}.intersection(OTHER_TRAINERS)):
        raise UserError(f"grid.loss: stock TRL's DPOTrainer has no {', '.join(others)}; take them out of the grid")
    keys = [cell.key for cell in params.grid.cells]
    with fetched_clone(repository) as folder:
        ours = run(folder, "prefscan", "launch", "--dirty")
        generated = 0
        for key in keys:
            answered = read_json(folder / ANSWER_METRICS / f"{key}.json")
            generated += round(answered["mean_tokens"] * 2 * answered["questions"])
        cells = study_loop(folder, keys[:limit])
        head = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    study = fmean(cell["total_seconds"] for cell in cells) * len(keys)
    return {
        "commit": commit,
        "cells": len(keys),
        "ours": {"seconds": ours, "generated_tokens": generated},
        "study": {"seconds": study, "extrapolated": len(cells) < len(keys), "cells": cells},
        "ratio": study / ours,
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(title="The study's loop, seconds")
    for column in ("cell", "trained as", *PHASES, "total"):
        table.add_column(column, justify="right")
    for cell in result["study"]["cells"]:
        phases = [f"{cell['seconds'][name]:.1f}" for name in PHASES]
        table.add_row(cell["cell"], cell["trained_as"], *phases, f"{cell['total_seconds']:.1f}")
    console.print(table)
    study, count = result["study"], len(result["study"]["cells"])
    how = f"extrapolated from {count} of {result['cells']} cells" if study["extrapolated"] else f"all {count} cells"
    console.print(f"study's loop: {study['seconds']:.0f} s ({how}), without fetch")
    console.print(f"make sweep: {result['ours']['seconds']:.0f} s, the whole pipeline without fetch")
    console.print(f"ratio: {result['ratio']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The sweep against the study's loop; the module's text says how.")
    parser.add_argument("--cells", type=int, help="run only the loop's first N cells and extrapolate")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--study-cell", help=argparse.SUPPRESS)  # a process of this benchmark itself
    options = parser.parse_args()
    if options.cells is not None and options.cells < 1:
        parser.error("--cells must be 1 or more")
    if options.study_cell:
        write_json(options.json, study_cell(options.study_cell))
        return
    result = compare(ROOT, options.cells)
    show(result, Console(width=120))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    run_command("sweep", main)
