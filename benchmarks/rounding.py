"""How far the layouts' fp32 is from exact: losses and LoRA gradients of stock TRL and the fast path, against float64.

    dvc repro prepare && PYTHONPATH=src python benchmarks/rounding.py --json runs/rounding.json

The same pairs, adapter and settings as in train_step.py, with lengths as in Orca. `exact` is stock TRL's own
computation, reference pass included, with the model in float64, which rounds to 2e-9 of what fp32 does. A difference
between two layouts in fp32 does not say which of them is off; this does. Nothing is timed.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prefscan.common.errors import run
from prefscan.common.io import read_jsonl, write_json
from prefscan.common.paths import BASE, TRAIN_PAIRS
from prefscan.logprobs.reference import micro_batches
from prefscan.models.loading import load_tokenizer
from train_step import UPDATE, Pair, Variant, make_pairs, settings, vocabulary_of

LAYOUTS = {"exact": "stock", "stock": "stock", "fast": "fast"}  # to train_step's variants


def loss_and_gradient(variant: Variant, pairs: list[Pair]) -> tuple[float, torch.Tensor]:
    """An update's loss, and the gradient of all LoRA weights as one float64 vector."""
    trainer = variant.trainer
    batches = micro_batches(variant.with_reference(pairs), variant.size)
    loss = sum(trainer.training_step(variant.model, trainer.data_collator(batch)).item() for batch in batches)
    weights = sorted((name, weight.grad) for name, weight in variant.model.named_parameters() if weight.requires_grad)
    gradient = torch.cat([grad.double().flatten() for _, grad in weights])
    variant.model.zero_grad()
    return loss, gradient


def measure(folder: Path, micro_batch: int, count: int) -> list[dict[str, Any]]:
    """Of each update: every layout's loss, and the distance of its gradient from the exact one, relative to that."""
    compared = settings("smollm2", micro_batch, "fast", "none")
    pairs = make_pairs(read_jsonl(TRAIN_PAIRS), "orca", UPDATE["smollm2"] * count, vocabulary_of(folder))
    tokenizer = load_tokenizer(folder)
    variants = {layout: Variant(name, compared, folder, tokenizer, pairs) for layout, name in LAYOUTS.items()}
    variants["exact"].model.double()
    found = []
    for update in micro_batches(pairs, UPDATE["smollm2"]):
        results = {layout: loss_and_gradient(variant, update) for layout, variant in variants.items()}
        exact = results["exact"][1]
        found.append(
            {
                layout: {"loss": loss, "gradient_error": float((gradient - exact).norm() / exact.norm())}
                for layout, (loss, gradient) in results.items()
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{len(found)} updates of {UPDATE['smollm2']} pairs, lengths as in Orca, against float64")
    for column in ("layout", "loss off by, mean", "at most", "gradient off by, relative, mean", "at most"):
        shown.add_column(column, justify="left" if column == "layout" else "right")
    for layout in ("stock", "fast"):
        losses = [abs(update[layout]["loss"] - update["exact"]["loss"]) for update in found]
        gradients = [update[layout]["gradient_error"] for update in found]
        figures = [summary(errors) for errors in (losses, gradients) for summary in (fmean, max)]
        shown.add_row(layout, *(f"{value:.1e}" for value in figures))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="The rounding of both layouts; the module's text says how.")
    parser.add_argument("--micro-batch", type=int, default=2, help="pairs (default: 2, as in the laptop's recipe)")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    found = measure(BASE, options.micro_batch, options.updates)
    Console(width=120).print(table(found))
    if options.json:
        write_json(options.json, {"micro_batch": options.micro_batch, "updates": found})


if __name__ == "__main__":
    run("rounding", main)
