from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from prefscan.common.config import Accelerate
from prefscan.logprobs.layouts import load_layout
from prefscan.models.memory import activation_bytes, free_bytes, kept_tokens
from tiny import heads_of_64, random_pairs
from train_data import changed

GIB = 2**30


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30), "fp32", 49_920 * 30),
        (LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32), "bf16", 323_584 * 32),
        # Attention wider than the hidden state, and a model that names no inner width.
        (
            LlamaConfig(hidden_size=64, intermediate_size=10, num_hidden_layers=1, num_attention_heads=8, head_dim=16),
            "fp32",
            44 * 128 + 16 * 10,
        ),
        (GPT2Config(n_embd=64, n_layer=2, n_head=4), "fp32", 2 * (44 * 64 + 16 * 256)),
    ],
    ids=["SmolLM2-135M", "Mistral-7B", "wide heads", "GPT-2"],
)
def test_activation_bytes_of_a_token(config: Any, dtype: str, expected: int) -> None:
    assert activation_bytes(config, 1, dtype) == expected
    assert activation_bytes(config, 1000, dtype) == 1000 * expected


def kept(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []  # or another tensor could take a freed one's place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for place, size in saved.items() if place not in own)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_is_what_layers_keep_or_up_to_twice_as_much(layout: str, dtype: str) -> None:
    pairs = random_pairs([(60, 40, 40)] * 3)
    measured = []
    for layers in (1, 3):
        model = heads_of_64(layers, heads=4, key_heads=2, dtype=dtype)
        batch = load_layout(layout).collate(pairs, 0)
        measured.append(kept(model, lambda m=model, b=batch: load_layout(layout).pair_logps(m, b)))
    two_layers = measured[1] - measured[0]
    model.config.num_hidden_layers = 2
    estimate = activation_bytes(model.config, load_layout(layout).most_positions(pairs, 3), dtype)
    assert two_layers <= estimate <= 2 * two_layers


@pytest.mark.parametrize(
    ("setting", "distributed", "needed", "kept", "which"),
    [
        ("auto", None, 3 * GIB, 900, "off"),
        ("auto", None, 4 * GIB, 900, "off"),
        ("auto", None, 6 * GIB, 600, "for micro-batches of over 600 tokens"),
        ("auto", "MULTI_GPU", 6 * GIB, 600, "for micro-batches of over 600 tokens"),
        ("auto", "FSDP", 6 * GIB, 0, "on"),
        ("auto", "DEEPSPEED", 6 * GIB, 0, "on"),
        ("auto", "FSDP", 4 * GIB, 900, "off"),
        (True, None, 3 * GIB, 0, None),
        (False, None, 9 * GIB, 900, None),
    ],
)
def test_auto_keeps_what_takes_up_to_half_of_the_free_memory(
    params: Any,
    setting: Any,
    distributed: Any,
    needed: int,
    kept: int,
    which: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accelerate = distributed and Accelerate(distributed_type=distributed, num_processes=2, num_machines=1)
    train, runtime = changed(params.train, params.runtime, gradient_checkpointing=setting, accelerate=accelerate)
    assert kept_tokens(train, runtime, 900, needed, 8 * GIB) == kept
    sizes = f"{needed / GIB:.1f} GiB for the longest, of 900 tokens, and 8.0 GiB free"
    printed = f"activation checkpointing {which}: activations take up to {sizes}\n"
    assert capsys.readouterr().out == (printed if which else "")


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/meminfo").exists(), reason="not the memory of Linux")
def test_the_free_memory_is_the_machines() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    assert free_bytes() == pytest.approx(available, rel=0.2)
