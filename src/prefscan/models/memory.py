"""Which micro-batches keep their activations in memory, and which recompute them in the backward pass."""

import psutil
import torch
from transformers import PretrainedConfig

from prefscan.common.config import Runtime, Train

# Bytes that a layer keeps for the backward pass, for each token and unit of width: of the hidden state 11 fp32 copies
# (norms, LoRA's inputs, attention), of the MLP's inner state 4 copies. tests/models/test_memory.py measures them again.
HIDDEN = 44
INNER = {"fp32": 16, "bf16": 10, "fp16": 10}
# Of the free memory. The rest is for gradients, the optimizer and what the allocator loses.
SHARE = 0.5


def activation_bytes(config: PretrainedConfig, tokens: int, dtype: str) -> int:
    """Memory for the activations of a forward pass with LoRA: layers × tokens × (44 hidden + 16 or 10 inner) bytes."""
    text = config.get_text_config()
    hidden = max(text.hidden_size, text.num_attention_heads * (getattr(text, "head_dim", None) or 0))
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    return text.num_hidden_layers * tokens * (HIDDEN * hidden + INNER[dtype] * inner)


def free_bytes() -> int:
    """Of the GPU where there is one, else of the machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def kept_tokens(train: Train, runtime: Runtime, longest: int, needed: int, free: int) -> int:
    """The most tokens of a micro-batch whose activations are kept; a longer one recomputes them, with the same result.

    `needed` are the bytes of activations of a micro-batch of `longest` tokens, the longest there is. `auto` keeps what
    takes up to half of the `free` bytes; but all or nothing under FSDP and DeepSpeed, where processes gather a layer's
    weights together: one that recomputed alone would wait for the others.
    """
    if runtime.gradient_checkpointing != "auto":
        return 0 if runtime.gradient_checkpointing else longest
    kept = min(longest, int(SHARE * free) * longest // needed)
    if kept < longest and train.accelerate and train.accelerate.distributed_type != "MULTI_GPU":
        kept = 0
    which = {longest: "off", 0: "on"}.get(kept, f"for micro-batches of over {kept} tokens")
    sizes = f"{needed / 2**30:.1f} GiB for the longest, of {longest} tokens, and {free / 2**30:.1f} GiB free"
    print(f"activation checkpointing {which}: activations take up to {sizes}", flush=True)
    return kept
