"""Merge a cell's adapter into the base, and measure what the merge kept.

    prefscan merge ipo-0.5-16

Rounding can erase a small adapter: merged in bf16, an early one kept 16 % of its margin. So can another base: one
trained on a 4-bit base is merged into the base as published. So the stage compares the held-out margin of the merged
weights with that of base + adapter, the 4-bit base as trained or else the base in fp32, and counts the weights that
changed at all. Where training computed in fp32, its own figures of the pairs are those of base + adapter. One model is
in memory at a time.
With `merge.format: adapter` it writes a manifest of hashes instead of a model, and later stages apply the adapter. The
cell then answers with other numbers than were merged, as it does in another `answer.dtype` than fp32: its margin as the
answer stage loads it is measured as well, over all held-out pairs.
"""

import gc
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.progress import track
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from prefscan.common.config import Merge, Train
from prefscan.common.intervals import mean_interval
from prefscan.logprobs.layouts import Layout, load_layout
from prefscan.models.loading import (
    DTYPES,
    device,
    load_cell,
    load_model,
    set_evaluation,
)
from prefscan.models.memory import free_bytes

# Bytes on the GPU beside the fp32 weights: the adapter, copies of the weight being merged, a pair's activations.
ROOM = 4 * 2**30


@torch.no_grad()
def margins(model: nn.Module, layout: Layout, pairs: list[Any], description: str) -> torch.Tensor:
    """log π(chosen) − log π(rejected) of each pair, in nats; shape `[pairs]`."""
    rows = []
    for pair in track(pairs, description):
        chosen, rejected = layout.pair_logps(model, layout.collate([pair], 0))
        rows.append((chosen.double() - rejected.double()).cpu())  # as differences of the reference's columns
    return torch.cat(rows)


def fp32_bytes(folder: Path) -> int:
    """Size of a model's weights in fp32, from the headers of its files."""
    sizes = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            sizes += [4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return sum(sizes)


def load_fp32(base: Path) -> PreTrainedModel:
    """The base in fp32, frozen and in evaluation mode: on the GPU where it fits, else on the CPU."""
    needed, free, place = fp32_bytes(base) + ROOM, free_bytes(), device()
    if place.type != "cpu" and needed > free:
        place = torch.device("cpu")
        sizes = f"fp32 takes up to {needed / 2**30:.1f} GiB, and the GPU has {free / 2**30:.1f} GiB free"
        print(f"merging on the CPU: {sizes}", flush=True)
    return load_model(base, "fp32", place=place).requires_grad_(False)


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    policy = PeftModel.from_pretrained(model, adapter, torch_device=model.device.type)
    set_evaluation(policy)  # PEFT has called eval() for all layers
    return policy


def base_margins(policy: PeftModel, layout: Layout, pairs: list[Any]) -> torch.Tensor:
    with policy.disable_adapter():
        return margins(policy, layout, pairs, "base")


def recorded_margins(pairs: list[Any], of: str) -> torch.Tensor:
    """Those of the base, `ref`, by the reference stage, or of base + adapter, `policy`, by training; as `margins`."""
    found = [pair[f"{of}_chosen_logps"] - pair[f"{of}_rejected_logps"] for pair in pairs]
    return torch.tensor(found, dtype=torch.float64)


def free_memory() -> None:
    """Of models that nothing names any more: their modules and hooks refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def margin_on_4_bit(
    base: Path, adapter: Path, pairs: list[Any], layout: Layout, dtype: str, quantization: str, double: bool
) -> float:
    """Mean margin of the 4-bit base + adapter against the 4-bit base, in nats; both are freed again."""
    policy = with_adapter(load_model(base, dtype, quantization, double).requires_grad_(False), adapter)
    before = base_margins(policy, layout, pairs)
    margin = (margins(policy, layout, pairs, "4-bit base + adapter") - before).mean().item()
    del policy
    free_memory()
    return margin


def margin_answering(base: Path, cell: Path, pairs: list[Any], layout: Layout, dtype: str) -> dict[str, Any]:
    """Mean margin of a cell against the base in nats, with its 95 % interval, both as the answer stage loads them.

    `cell` is the folder that this stage has written. Base and cell are rounded apart in `dtype`: in bf16, a pair's
    margin under a cell of SmolLM2 was off by 1.2 nats (standard deviation over 34), so a few pairs would not do.
    """
    found = []
    for name, loader, folder in (("base", load_model, base), ("cell", load_cell, cell)):
        free_memory()
        model = loader(folder, dtype).requires_grad_(False)
        found.append(margins(model, layout, pairs, f"{name} as it answers, in {dtype}"))
        del model
    before, after = found
    margin, low, high = mean_interval((after - before).tolist())
    return {
        "answer_dtype": dtype,
        "answering_pairs": len(pairs),
        "margin_answering": margin,
        "margin_answering_low": low,
        "margin_answering_high": high,
    }


def rounded(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values that a weight will be saved with, in the dtype that it is computed in."""
    return weight.to(DTYPES[dtype]).to(weight.dtype)


def merge_weights(policy: PeftModel, dtype: str) -> int:
    """Merge each adapted weight where it stands, and count the values that differ after rounding.

    Both sides are rounded, or values that only rounding changed would count as the adapter's.
    """
    changed = 0
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight
            before = weight.data
            layer.merge(safe_merge=True)  # gives the weight a new tensor: `before` stays as it is
            changed += int((rounded(weight.data, dtype) != rounded(before, dtype)).sum())
    return changed


def merge_cell(
    base: Path, adapter: Path, pairs: list[Any], merge: Merge, train: Train
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The merged model, in fp32 holding values of `merge.dtype`, and what the merge kept.

    `margin_adapter` and `margin_merged` are mean margins against the base, in nats, over the given pairs, which have
    the reference's columns and the trained policy's. For an adapter trained on a 4-bit base, `margin_adapter` is
    measured on that base and against it: what the training made.
    """
    layout = load_layout(train.layout)
    loading = train.dtype, train.bnb_4bit_quant_type, train.bnb_4bit_use_double_quant
    quantized = train.bnb_4bit_quant_type != "none"
    margin_adapter = margin_on_4_bit(base, adapter, pairs, layout, *loading) if quantized else None
    model = load_fp32(base)
    size = sum(weight.numel() for weight in model.parameters())
    policy = with_adapter(model, adapter)
    # Else what is recorded is of another base than the one merged into, or rounded by what shared its micro-batch.
    exact = train.dtype == "fp32" and not quantized
    before = recorded_margins(pairs, "ref") if exact else base_margins(policy, layout, pairs)
    if margin_adapter is None:
        trained = recorded_margins(pairs, "policy") if exact else margins(policy, layout, pairs, "base + adapter")
        margin_adapter = (trained - before).mean().item()
    changed = merge_weights(policy, merge.dtype)
    merged: Any = policy.unload()
    for weight in merged.parameters():
        weight.data = rounded(weight.data, merge.dtype)
    after = (margins(merged, layout, pairs, "merged") - before).mean().item()
    metrics = {
        "dtype": merge.dtype,
        "format": merge.format,
        "pairs": len(pairs),
        "margin_adapter": margin_adapter,
        "margin_merged": after,
        "margin_kept": after / margin_adapter if margin_adapter else None,
        "weights_changed": changed / size,
    }
    return merged, metrics
