"""Merge a cell's adapter into the base, and measure what the merge kept.

    python -m prefscan.merge ipo-0.5-24

Rounding can erase a small adapter: merged in bf16, an early one kept 16 % of its margin. So the stage compares the
held-out margin of the merged weights with that of base + adapter in fp32, and counts the weights that changed at all.
With `merge.format: adapter` it writes a manifest of hashes instead of a model, and later stages apply the adapter.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel

from prefscan.engines import Engine, load_engine
from prefscan.errors import run_stage
from prefscan.files import new_folder, read_jsonl, write_json
from prefscan.models import DTYPES, MANIFEST, load_model, load_tokenizer, manifest
from prefscan.params import Merge, load
from prefscan.paths import ADAPTERS, BASE, HELDOUT_PAIRS, MERGE_METRICS, MERGED


@torch.no_grad()
def margins(model: nn.Module, engine: Engine, pairs: list[Any], description: str) -> torch.Tensor:
    """log π(chosen) − log π(rejected) of each pair, in nats; shape `[pairs]`."""
    rows = []
    for pair in track(pairs, description):
        chosen, rejected = engine.pair_logps(model, engine.collate([pair], 0))
        rows.append((chosen - rejected).double().cpu())
    return torch.cat(rows)


def round_weights(model: nn.Module, dtype: str) -> None:
    """Round every weight to the dtype it will be saved in, and keep computing in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).to(parameter.dtype)


def merge_cell(
    base: Path, adapter: Path, pairs: list[Any], merge: Merge, engine: Engine
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The merged model, in fp32 holding values of `merge.dtype`, and what the merge kept.

    `margin_adapter` and `margin_merged` are mean margins against the base, in nats, over the given pairs.
    """
    model = PeftModel.from_pretrained(load_model(base, "fp32").requires_grad_(False), adapter).eval()
    with model.disable_adapter():
        before = margins(model, engine, pairs, "base")
    with_adapter = (margins(model, engine, pairs, "base + adapter") - before).mean().item()
    rounded_base = load_model(base, "fp32")
    round_weights(rounded_base, merge.dtype)  # or weights that only rounding changed would count as the adapter's
    original = dict(rounded_base.named_parameters())
    merged: Any = model.merge_and_unload(safe_merge=True)
    round_weights(merged, merge.dtype)
    after = (margins(merged, engine, pairs, "merged") - before).mean().item()
    weights = {name: weight for name, weight in merged.named_parameters() if name in original}
    changed = sum(int((weight != original[name]).sum()) for name, weight in weights.items())
    metrics = {
        "dtype": merge.dtype,
        "format": merge.format,
        "pairs": len(pairs),
        "margin_adapter": with_adapter,
        "margin_merged": after,
        "margin_kept": after / with_adapter if with_adapter else None,
        "weights_changed": changed / sum(weight.numel() for weight in weights.values()),
    }
    return merged, metrics


def main() -> None:
    params = load()
    (key,) = sys.argv[1:]
    params.cell(key)
    pairs = read_jsonl(HELDOUT_PAIRS)[: params.merge.check_pairs]
    merged, metrics = merge_cell(BASE, ADAPTERS / key, pairs, params.merge, load_engine(params.train.engine))
    with new_folder(MERGED / key) as folder:
        if params.merge.format == "adapter":
            write_json(folder / MANIFEST, manifest(BASE, ADAPTERS / key))
        else:
            merged.to(DTYPES[params.merge.dtype]).set_attn_implementation("sdpa")
            merged.save_pretrained(folder)
            load_tokenizer(BASE).save_pretrained(folder)
    write_json(MERGE_METRICS / f"{key}.json", metrics)
    kept = metrics["margin_kept"]
    print(f"{key}: the merge kept {'nothing to keep' if kept is None else f'{kept:.1%}'} of the held-out margin")


if __name__ == "__main__":
    run_stage(main)
