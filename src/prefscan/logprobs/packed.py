"""Log-probabilities of preference pairs without padding and with one copy of each prompt.

A pair is one stretch `[prompt | chosen | rejected]` of a flat row, and a micro-batch is several such stretches one
after the other. The rejected branch takes the position ids that follow the prompt and attends to `[prompt | rejected]`
only, so each response sees exactly the context it would see alone. Against the usual layout (prompt + chosen and
prompt + rejected as padded rows) the prompt is computed once, nothing is computed for padding, and the LM head runs
only where a response token is predicted, in chunks, so that the full logits never exist.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import lengths_of

FUSED_LORA = True
ATTENTION = "prefscan_packed"
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
ATTENTION_CHANGES = ("softcap", "s_aux", "position_bias", "attention_mask")  # logit cap, sinks, ALiBi, and their like
LAYERS = {"full_attention", "sliding_attention"}  # a convolution or a recurrence would read on into the next branch
# By itself FlexAttention takes a kernel for decoding for rows of under 128 tokens, and torch cannot build it where
# these times the query heads of a key head are over 128.
KERNEL = {"BACKEND": "TRITON"}
# Bytes of a GPU's shared memory that torch's FlexAttention takes for its backward pass where heads are larger than 128;
# consumer GPUs have 101,376 (pytorch issues 198224 and 180278).
LARGE_HEADS = 114_688
HEAD_CHUNK = 256  # positions a call of the LM head: 50 MB of fp32 logits at a vocabulary of 49,152


@dataclass(frozen=True)
class PackedPairs:
    """B pairs in one flat row of T tokens, with N response tokens to predict."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], restarting after the prompt for the rejected branch
    lengths: list[tuple[int, int, int]]  # B × (prompt, chosen, rejected)
    predictors: Tensor  # [N], the place in the row whose hidden state predicts a response token
    targets: Tensor  # [N], that response token
    segments: Tensor  # [N], the response it belongs to: 0 … B−1 chosen, B … 2B−1 rejected

    def to(self, device: torch.device) -> "PackedPairs":
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def collate(pairs: Sequence[Mapping[str, Any]], pad_token_id: int) -> PackedPairs:
    """Lay out pairs, each with the token lists `prompt_ids`, `chosen_ids` and `rejected_ids`, in one unpadded row."""
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[tuple[int, int, int]] = []
    predictors: list[list[int]] = [[] for _ in range(2 * len(pairs))]
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        p, c, r = lengths_of(pair)
        last = len(ids) + p - 1  # the prompt's last token predicts the first token of both responses
        predictors[i] = list(range(last, last + c))
        predictors[len(pairs) + i] = [last, *range(last + c + 1, last + c + r)]
        ids += [*prompt, *chosen, *rejected]
        positions += [*range(p + c), *range(p, p + r)]
        lengths.append((p, c, r))
    responses = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
    return PackedPairs(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        lengths=lengths,
        predictors=torch.tensor([i for places in predictors for i in places]),
        targets=torch.tensor([token for response in responses for token in response]),
        segments=torch.repeat_interleave(torch.tensor([len(response) for response in responses])),
    )


def positions(batch: PackedPairs) -> int:
    return batch.input_ids.numel()


def most_positions(pairs: Sequence[Mapping[str, Any]], batch_size: int) -> int:
    return sum(heapq.nlargest(batch_size, (sum(lengths_of(pair)) for pair in pairs)))


def refuse_long(model: nn.Module, pairs: Sequence[Mapping[str, Any]], what: str, lower: str) -> None:
    """For a pair beyond the model's sliding window, which this layout does not apply."""
    refuse_beyond(sliding_window(model), [lengths_of(pair) for pair in pairs], what, lower)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pair_lengths: Sequence[tuple[int, int, int]] = (),
    pair_mask: Any = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over packed pairs; the signature is that of transformers' `AttentionInterface`.

    `query` is `[1, heads, T, head_dim]`; returns `[1, T, heads, head_dim]`. Causal within `[prompt | chosen]`;
    the rejected branch attends to the prompt and, causally, to itself. With `pair_mask`, a BlockMask of the whole row,
    one FlexAttention call does it; without, two SDPA calls a pair. Raises UserError for a pair longer than the model's
    sliding window, and for an attention that is more than softmax(q·k)·v, as by a mask that the model makes itself.
    """
    others |= {"attention_mask": attention_mask}
    if changes := [name for name in ATTENTION_CHANGES if others.get(name) is not None]:
        raise UserError(
            f"train.layout: 'packed' does not compute the {' and '.join(changes)} of {type(module).__name__}"
        )
    refuse_beyond(sliding_window, pair_lengths)
    if pair_mask is not None and not dropout:  # FlexAttention has no dropout
        out = flex_attention()(
            query, key, value, block_mask=pair_mask, scale=scaling, enable_gqa=True, kernel_options=KERNEL
        )
        return out.transpose(1, 2).contiguous(), None
    sizes = [size for lengths in pair_lengths for size in lengths]
    # Splits and not slices: the gradient of a slice is a tensor of the whole row, to be filled with zeros and added.
    queries, keys, values = (iter(states.split(sizes, dim=2)) for states in (query, key, value))
    outputs = []

    def attend(queries: Tensor, keys: list[Tensor], values: list[Tensor], mask: Any) -> None:
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                torch.cat(keys, dim=2),
                torch.cat(values, dim=2),
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
                is_causal=mask is None,
                enable_gqa=True,
            )
        )

    for p, _, r in pair_lengths:
        (q, q_chosen, q_rejected), (k, k_chosen, k_rejected), (v, v_chosen, v_rejected) = (
            islice(parts, 3) for parts in (queries, keys, values)
        )
        attend(torch.cat([q, q_chosen], dim=2), [k, k_chosen], [v, v_chosen], None)
        attend(q_rejected, [k, k_rejected], [v, v_rejected], causal_lower_right(r, p + r))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def refuse_beyond(
    window: int | None,
    lengths: Sequence[tuple[int, int, int]],
    what: str = "a pair",
    lower: str = "data.max_length",
) -> None:
    """Raises UserError where a prompt and a response are longer than the window, which this layout does not apply."""
    longest = max(p + max(c, r) for p, c, r in lengths)
    if window is not None and longest > window:
        raise UserError(f"{what} has {longest} tokens, more than the model's sliding window of {window}; lower {lower}")


def sliding_window(model: Any) -> int | None:
    """The tokens that a layer looks back on, by the model's configuration; None where every layer sees all."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if layers is None or "sliding_attention" in layers else None


@cache
def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled where there is a GPU: uncompiled, as on a CPU, it computes every masked score."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    return torch.compile(attend, dynamic=True) if torch.cuda.is_available() else attend


def block_mask(lengths: Sequence[tuple[int, int, int]], device: torch.device) -> Any:
    """FlexAttention's BlockMask of a row of packed pairs: who may attend to whom, in blocks of 128 × 128 tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = torch.tensor(lengths, device=device)  # [B, 3]
    part = torch.repeat_interleave(sizes.flatten())  # 3 · pair + (0 prompt, 1 chosen, 2 rejected); shape [T]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_pair = part[query] // 3 == part[key] // 3
        own_branch = (part[key] % 3 == 0) | (part[key] == part[query])
        return same_pair & own_branch & (query >= key)

    return create_block_mask(visible, None, None, len(part), len(part), device=str(device))


def flex_fits(model: PreTrainedModel) -> bool:
    """Whether the model's GPU has the shared memory that FlexAttention takes for its heads."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head <= 128:
        return True
    return getattr(torch.cuda.get_device_properties(model.device), "shared_memory_per_block_optin", 0) >= LARGE_HEADS


AttentionInterface.register(ATTENTION, packed_attention)
# The layout is in `pair_lengths`: transformers need not build a mask.
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


class _TokenLogps(torch.autograd.Function):
    """Log-probability of each target under a frozen LM head, in chunks.

    For a frozen head the gradient with respect to a hidden state, (onehot(target) − softmax(logits))·W, needs the same
    logits as the value, so it is taken in the forward pass: nothing is recomputed and no logits are kept. The
    difference is taken in fp32 before the product, since W[target] − softmax·W in bf16 is all rounding where the
    target is nearly certain.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_grad = hidden.requires_grad
        logps, slopes = [], []
        for states, ids in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = (states @ weight.T).float()
            places = torch.arange(len(ids), device=ids.device), ids
            # In place: another tensor of this size would take longer to allocate than to compute.
            logits -= logits.amax(-1, keepdim=True)
            shifted = logits[places]
            total = logits.exp_().sum(-1, keepdim=True)
            logps.append(shifted - total[:, 0].log())
            if needs_grad:
                errors = logits.div_(-total)
                errors[places] += 1
                slopes.append(errors.to(weight.dtype) @ weight)
        if needs_grad:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad_outputs[0][:, None].to(slopes.dtype) * slopes, None, None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an optional PEFT wrapper, set to the packed layout's attention."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, assignment]
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    scaled = [name for name in LOGIT_SCALES if getattr(config, name, None) is not None]
    if not isinstance(head, nn.Linear) or head.bias is not None or head.weight.requires_grad or scaled:
        raise UserError(
            f"train.layout: 'packed' needs a frozen, plain LM head, and {type(base).__name__} has "
            f"{' and '.join(scaled) or 'another'}"
        )
    if not head.weight.numel():
        raise UserError(
            "train.accelerate: DeepSpeed's ZeRO stage 3 leaves no process the LM head, which train.layout: 'packed' "
            "reads; set its stage to 2, or choose train/accelerate=fsdp"
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if base._is_stateful or not base._supports_attention_backend or not layers <= LAYERS:
        raise UserError(
            "train.layout: 'packed' needs a model that is attention throughout, through transformers' "
            f"AttentionInterface, and {type(base).__name__} is not"
        )
    if base.config._attn_implementation != ATTENTION:
        base.prefscan_attention = base.config._attn_implementation
        base.set_attn_implementation(ATTENTION)
    return base


def own_attention(model: Any) -> None:
    """Give a model back the attention that it was loaded with."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation(model.prefscan_attention)


def pair_logps(model: nn.Module, batch: PackedPairs) -> tuple[Tensor, Tensor]:
    """Log-probability, in nats, of the chosen `[B]` and of the rejected `[B]` responses, summed over their tokens."""
    base = causal_lm(model)
    refuse_beyond(sliding_window(base), batch.lengths)  # some models have their window in masks alone
    batch = batch.to(base.device)
    flexible = base.device.type == "cuda" and flex_fits(base)
    hidden = base.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        pair_lengths=batch.lengths,
        pair_mask=block_mask(batch.lengths, base.device) if flexible else None,
    ).last_hidden_state[0]
    head = base.get_output_embeddings().weight
    if isinstance(head, DTensor):  # FSDP's hooks would gather it where the head is called, which it is not
        head = head.full_tensor()
    logps = _TokenLogps.apply(hidden[batch.predictors], head, batch.targets)
    sums = torch.zeros(2 * len(batch.lengths), dtype=torch.float32, device=logps.device)
    chosen, rejected = sums.index_add(0, batch.segments, logps).chunk(2)
    return chosen, rejected
