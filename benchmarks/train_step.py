"""Seconds, tokens/s and memory of a training step: stock TRL against the fast path, in one run, on the same pairs.

    dvc repro prepare && PYTHONPATH=src python benchmarks/train_step.py --json runs/train_step.json
    PYTHONPATH=src python benchmarks/train_step.py --shape mistral-7b        # needs a CUDA GPU

The variants, which take turns so that a slow moment of the machine meets all of them:

- `stock`: TRL's DPOTrainer as the study ran it: padded rows, and a reference pass (adapter off) at every step;
- `precomputed`: the same, with the reference's log-probabilities in the batch;
- `fast`: prefscan's PairTrainer with `train.layout: packed`.

A step is one optimizer update on 4 pairs (SmolLM2) or 16 (Mistral, as in the study), in micro-batches of the size under
test: collator, forward, loss and backward through the trainer's own `training_step`, then clipping and optimizer.
`precomputed` and `fast` leave out the reference pass that they make once before training. LoRA, pairs and dtype are
equal, dropout is off. The learning rate is 0, which saves no work, so that all variants keep the same adapter, which is
not zero: their losses and gradient norms are compared at every step, and a difference ends the benchmark with an error.
Peak memory comes from one more process a variant, since a process's peak never falls: two updates on the largest batch,
all before the first timed update.

Lengths: `real` takes the pairs as prepare wrote them. `orca` cuts their tokens to lengths as in Intel/orca_dpo_pairs,
prompt 255, chosen 164 and rejected 237 tokens on average; the spread about them is assumed: log-normal quantiles with
σ = 0.5, of the three parts independently.

`--shape mistral-7b` builds the architecture with random weights, saves it to a temporary folder (14.5 GB) and loads it
in 4 bits with the study's settings; token ids are taken modulo its vocabulary.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, islice, permutations, product
from pathlib import Path
from statistics import NormalDist, fmean, median
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from configuration import group
from prefscan.common.config import Cell, Runtime, Train
from prefscan.common.errors import UserError, run
from prefscan.common.io import read_jsonl, read_text, write_json
from prefscan.common.paths import BASE, RUNS, TRAIN_PAIRS
from prefscan.logprobs import packed
from prefscan.logprobs.reference import micro_batches
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.training.lora import lora_config
from prefscan.training.losses import LOSSES
from prefscan.training.trainer import CellSettings, PairTrainer, TokenisedTrainer, peak_memory_gib, training_arguments

Pair = dict[str, Any]

VARIANTS = ("stock", "precomputed", "fast")
CELL = Cell(loss="sigmoid", beta=0.1, steps=1)
CONFIG = {"smollm2": "laptop", "mistral-7b": "study"}  # in conf/train
UPDATE = {"smollm2": 4, "mistral-7b": 16}  # pairs an update; the study's 16 would take minutes on 2 cores
ORCA = {"prompt_ids": 255, "chosen_ids": 164, "rejected_ids": 237}  # average tokens
ORCA_SIGMA = 0.5  # assumed, of the logarithm of a length
ADAPTER_SCALE = 2e-3  # of LoRA's B; at B = 0 policy and reference tie and any layout would give log 2
# Padding alone moves a summed log-probability by up to 0.5 nats in bf16; times β = 0.1.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}  # relative, of the norm


@dataclass(frozen=True)
class Step:
    """What one update did and took."""

    seconds: float
    loss: float
    gradient_norm: float
    tokens: int  # of prompt + chosen and of prompt + rejected, as counted in the batches, without padding
    positions: int  # that a forward pass computed, padding included


class Variant:
    """One way of training, with a model of its own, ready to step."""

    def __init__(
        self, name: str, settings: CellSettings, folder: Path, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
    ) -> None:
        self.name = name
        train = settings.train
        self.size = train.per_device_train_batch_size
        model = load_model(
            folder, train.dtype, train.bnb_4bit_quant_type, train.bnb_4bit_use_double_quant
        ).requires_grad_(False)
        recompute = settings.runtime.gradient_checkpointing is True
        arguments = training_arguments(settings, 1, recompute, RUNS / "train_step")
        common = {
            "model": model,
            "args": arguments,
            "train_dataset": Dataset.from_list(pairs),
            "processing_class": tokenizer,
            "peft_config": lora_config(train if name == "fast" else train.model_copy(update={"layout": "padded"})),
        }
        self.trainer: Any = (
            PairTrainer(
                cell=CELL,
                options=settings.options,
                layout=packed,
                pad_token_id=tokenizer.pad_token_id,
                kept_tokens=0,
                **common,
            )
            if name == "fast"
            else TokenisedTrainer(**common)
        )
        generator = torch.Generator().manual_seed(0)
        for parameter_name, parameter in self.trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * ADAPTER_SCALE)
        # What Trainer.train() does before its first step.
        if recompute:
            self.trainer.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs or None
            )
        self.trainer.create_optimizer()
        accelerator = self.trainer.accelerator
        self.model, self.trainer.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = train.gradient_accumulation_steps
        self.trainer.precompute_ref_logps = name != "stock"

    @torch.no_grad()
    def with_reference(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs with the reference's columns, computed in this variant's layout and micro-batches."""
        if self.name == "stock":
            return pairs
        trainer, rows = self.trainer, []
        for micro_batch in micro_batches(pairs, self.size):
            if self.name == "fast":
                with self.trainer.model.disable_adapter(), trainer.compute_loss_context_manager():
                    logps = packed.pair_logps(self.model, packed.collate(micro_batch, trainer.pad_token_id))
            else:
                inputs = trainer._prepare_inputs(trainer.data_collator(micro_batch))
                logps = trainer.compute_ref_log_probs(self.model, inputs)
            for pair, chosen, rejected in zip(micro_batch, *(values.tolist() for values in logps), strict=True):
                lengths = {"chosen_tokens": len(pair["chosen_ids"]), "rejected_tokens": len(pair["rejected_ids"])}
                rows.append(pair | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected} | lengths)
        return rows

    def step(self, pairs: list[Pair]) -> Step:
        """One optimizer update on pairs that have this variant's reference columns."""
        trainer = self.trainer
        loss, tokens, positions = 0.0, 0, 0
        synchronize()
        started = time.perf_counter()
        for micro_batch in micro_batches(pairs, self.size):
            inputs = trainer.data_collator(micro_batch)
            if self.name == "fast":
                tokens += sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in inputs["pairs"].lengths)
                positions += inputs["pairs"].input_ids.numel()
            else:
                tokens += int(inputs["attention_mask"].sum())
                positions += inputs["input_ids"].numel()
            loss += trainer.training_step(self.model, inputs).item()
        norm = trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.model.zero_grad()
        synchronize()
        trainer._metrics["train"].clear()  # as log() does after each update
        return Step(time.perf_counter() - started, loss, float(norm), tokens, positions)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def orca_lengths(mean: float, count: int, seed: int) -> list[int]:
    """`count` token counts with this mean: the quantiles of a log-normal distribution, shuffled."""
    spread = [NormalDist(0, ORCA_SIGMA).inv_cdf((i + 0.5) / count) for i in range(count)]
    shape = torch.tensor(spread, dtype=torch.float64).exp()
    lengths = [max(1, round(value)) for value in (shape * mean / shape.mean()).tolist()]
    random.Random(seed).shuffle(lengths)
    return lengths


def make_pairs(source: list[Pair], lengths: str, count: int, vocabulary: int) -> list[Pair]:
    """`count` pairs: the real ones in a seeded order, from the start again when they end, or cut to Orca's lengths."""
    order = random.Random(0).sample(source, len(source))
    pairs = [{key: pair[key] for key in ORCA} for pair in islice(cycle(order), count)]
    if lengths == "orca":
        for seed, (key, mean) in enumerate(ORCA.items()):
            stream = cycle([token for pair in order for token in pair[key]])
            for pair, length in zip(pairs, orca_lengths(mean, count, seed), strict=True):
                pair[key] = list(islice(stream, length))
    return [{key: [token % vocabulary for token in ids] for key, ids in pair.items()} for pair in pairs]


def settings(shape: str, micro_batch: int, variant: str, checkpointing: str) -> CellSettings:
    """The shape's configuration in conf/train, with the micro-batch under test and the same pairs an update."""
    train = Train.model_validate(group("train", CONFIG[shape]))
    pairs = UPDATE[shape]
    if pairs % micro_batch:
        raise UserError(
            f"--micro-batch: {micro_batch} does not divide the {pairs} pairs of an update; choose a size that does"
        )
    changes = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": pairs // micro_batch,
        "learning_rate": 0.0,
    }
    recompute = checkpointing == "all" or (checkpointing == "stock" and variant != "fast")
    runtime = Runtime(gradient_checkpointing=recompute, report_to="none")
    return CellSettings(CELL, train.model_copy(update=changes), LOSSES[CELL.loss].read_options({}), runtime, seed=0)


@contextmanager
def base_model(shape: str, vocabulary: int = 32002) -> Iterator[Path]:
    """The folder of the base: models/base, or Mistral-7B's architecture with random weights."""
    if shape == "smollm2":
        yield BASE
        return
    if not torch.cuda.is_available():
        raise UserError("--shape: mistral-7b needs a CUDA GPU and this machine has none; use --shape smollm2")
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(  # of OpenHermes-2.5-Mistral-7B
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # the weights would not fit twice in fp32
        with torch.device("cuda"):
            model = MistralForCausalLM(config)
        torch.set_default_dtype(default)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        yield Path(folder)


def vocabulary_of(folder: Path) -> int:
    return int(json.loads(read_text(folder / "config.json"))["vocab_size"])


def peak_memory(options: argparse.Namespace, folder: Path, variant: str, lengths: str, micro_batch: int) -> float:
    """GiB that training takes at most, from a process of its own."""
    with tempfile.TemporaryDirectory() as results:
        result = Path(results) / "peak.json"
        words = ["--shape", options.shape, "--checkpointing", options.checkpointing, "--lengths", lengths]
        words += ["--micro-batch", str(micro_batch), "--repetitions", str(options.repetitions), "--json", str(result)]
        words += ["--peak-of", variant, "--folder", str(folder)]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"the process that measures the memory of {variant} failed; its error stands above")
        return float(json.loads(result.read_text()))


def measure_peak(options: argparse.Namespace) -> float:
    """The other side of `peak_memory`: two updates on the largest batch, the second with the optimizer's state."""
    (lengths,), (micro_batch,), variant = options.lengths, options.micro_batch, options.peak_of
    cell = settings(options.shape, micro_batch, variant, options.checkpointing)
    updates = make_updates(options, lengths, cell.train, vocabulary_of(options.folder))
    largest = max(updates, key=lambda pairs: sum(len(pair[key]) for pair in pairs for key in ORCA))
    ready = Variant(variant, cell, options.folder, load_tokenizer(BASE), largest)
    pairs = ready.with_reference(largest)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        ready.step(pairs)
    return peak_memory_gib()


def make_updates(options: argparse.Namespace, lengths: str, train: Train, vocabulary: int) -> list[list[Pair]]:
    """The pairs of a warm-up update and of one update a repetition."""
    each = train.per_device_train_batch_size * train.gradient_accumulation_steps
    pairs = make_pairs(read_jsonl(TRAIN_PAIRS), lengths, each * (options.repetitions + 1), vocabulary)
    return list(micro_batches(pairs, each))


def check_agreement(steps: dict[str, Step], dtype: str) -> None:
    """Raises UserError when the variants did not compute the same: a fast wrong path is no result."""
    stock = steps["stock"]
    for name, step in steps.items():
        if step.tokens != stock.tokens:
            raise UserError(f"{name} ran {step.tokens} tokens and stock {stock.tokens} on the same pairs")
        # Written so that NaN fails as well.
        if not abs(step.loss - stock.loss) <= LOSS_TOLERANCE[dtype]:
            raise UserError(f"the loss of {name} is {step.loss:.6f} and stock's {stock.loss:.6f} on the same pairs")
        if not abs(step.gradient_norm - stock.gradient_norm) <= GRADIENT_TOLERANCE[dtype] * stock.gradient_norm:
            norms = f"{step.gradient_norm:.6g} and stock's {stock.gradient_norm:.6g}"
            raise UserError(f"the gradient norm of {name} is {norms} on the same pairs")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def measure(
    options: argparse.Namespace, folder: Path, lengths: str, micro_batch: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """All variants in turn on the same updates; one entry of the result's `runs`."""
    cells = {name: settings(options.shape, micro_batch, name, options.checkpointing) for name in VARIANTS}
    dtype = cells["stock"].train.dtype
    updates = make_updates(options, lengths, cells["stock"].train, vocabulary_of(folder))
    tokenizer = load_tokenizer(BASE)
    variants = [Variant(name, cells[name], folder, tokenizer, updates[0]) for name in VARIANTS]
    repetitions: list[dict[str, Step]] = []
    # Every order in turn, so that each variant runs as often after each other one.
    for update, turn in zip(updates, cycle(permutations(variants)), strict=False):
        prepared = {variant.name: variant.with_reference(update) for variant in variants}
        steps = {variant.name: variant.step(prepared[variant.name]) for variant in turn}
        check_agreement(steps, dtype)
        repetitions.append(steps)
    timed = repetitions[1:]
    results = {}
    for name in VARIANTS:
        steps_of = [steps[name] for steps in timed]
        results[name] = {
            "seconds": spread([step.seconds for step in steps_of]),
            "ratio_to_fast": spread([steps[name].seconds / steps["fast"].seconds for steps in timed]),
            "tokens_per_second": sum(step.tokens for step in steps_of) / sum(step.seconds for step in steps_of),
            "peak_memory_gib": peaks[name],
            "loss_difference": max(abs(steps[name].loss - steps["stock"].loss) for steps in timed),
            "gradient_difference": max(
                abs(steps[name].gradient_norm / steps["stock"].gradient_norm - 1) for steps in timed
            ),
            "steps": [vars(step) for step in steps_of],
        }
    pairs = [pair for update in updates[1:] for pair in update]
    return {
        "lengths": lengths,
        "micro_batch": micro_batch,
        "pairs_a_step": len(updates[0]),
        "mean_tokens": {key.removesuffix("_ids"): fmean(len(pair[key]) for pair in pairs) for key in ORCA},
        "variants": results,
    }


def table(run: dict[str, Any], shape: str) -> Table:
    tokens = ", ".join(f"{name} {mean:.0f}" for name, mean in run["mean_tokens"].items())
    title = f"{shape}, {run['lengths']} lengths ({tokens}), {run['pairs_a_step']} pairs a step by {run['micro_batch']}"
    shown = Table(title=title)
    for column in ("variant", "s a step", "× fast [min–max]", "tokens/s", "peak GiB", "loss", "Δ loss", "Δ gradient"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for name, result in run["variants"].items():
        ratio = result["ratio_to_fast"]
        shown.add_row(
            name,
            f"{result['seconds']['median']:.2f}",
            f"{ratio['median']:.2f} [{ratio['min']:.2f}–{ratio['max']:.2f}]",
            f"{result['tokens_per_second']:.0f}",
            f"{result['peak_memory_gib']:.2f}",
            f"{result['steps'][-1]['loss']:.5f}",
            f"{result['loss_difference']:.1e}",
            f"{result['gradient_difference']:.1e}",
        )
    return shown


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    return {"gpu": gpu, "threads": torch.get_num_threads(), **packages}


def positive_list(text: str) -> list[int]:
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def length_list(text: str) -> list[str]:
    names = text.split(",")
    if not {*names} <= {"real", "orca"}:
        raise ValueError
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Stock TRL against the fast path; the module's text says how.")
    parser.add_argument("--shape", choices=list(CONFIG), default="smollm2")
    parser.add_argument("--lengths", type=length_list, default="real,orca", help="real, orca or both (default: both)")
    parser.add_argument("--micro-batch", type=positive_list, default="1,2,4", help="pairs (default: 1,2,4)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed updates a variant, after one uncounted")
    parser.add_argument(
        "--checkpointing",
        choices=["all", "stock", "none"],
        help="which variants recompute activations (default: all for mistral-7b, as the study; else none)",
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)  # a process of this benchmark itself
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    options.checkpointing = options.checkpointing or ("all" if options.shape == "mistral-7b" else "none")
    if options.peak_of:
        write_json(options.json, measure_peak(options))
        return
    for micro_batch in options.micro_batch:
        settings(options.shape, micro_batch, "fast", options.checkpointing)  # refuse a wrong size before any work
    console = Console(width=120)  # where it is not a terminal too: a narrower table folds its figures
    result: dict[str, Any] = {
        "shape": options.shape,
        "checkpointing": options.checkpointing,
        "repetitions": options.repetitions,
        "machine": machine(),
        "runs": [],
    }
    with base_model(options.shape) as folder:
        runs = list(product(options.lengths, options.micro_batch))
        # First: once this process has held models, the stages' GLIBC_TUNABLES have it keep their memory.
        peaks = {run: {name: peak_memory(options, folder, name, *run) for name in VARIANTS} for run in runs}
        for run in runs:
            figures = measure(options, folder, *run, peaks[run])
            console.print(table(figures, options.shape))
            result["runs"].append(figures)
            if options.json:
                write_json(options.json, result)


if __name__ == "__main__":
    run("train_step", main)
