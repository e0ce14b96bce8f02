"""The layout of stock TRL: prompt + chosen and prompt + rejected as rows of their own, padded on the right."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from prefscan.logprobs.layouts import lengths_of

FUSED_LORA = False  # this layout is stock TRL's in every part


def collate(pairs: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """TRL's own collator: `input_ids`, `attention_mask`, `completion_mask`, each `[2B, longest]`, chosen rows first."""
    rows = [{key: pair[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]
    batch: dict[str, Tensor] = DataCollatorForPreference(pad_token_id=pad_token_id)(rows)
    return batch


def positions(batch: dict[str, Tensor]) -> int:
    return batch["input_ids"].numel()


def most_positions(pairs: Sequence[Mapping[str, Any]], batch_size: int) -> int:
    return 2 * batch_size * max(p + max(c, r) for p, c, r in map(lengths_of, pairs))


def refuse_long(model: nn.Module, pairs: Sequence[Mapping[str, Any]], what: str, lower: str) -> None:
    """Refuses nothing: the model applies its own masks."""


def pair_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probability, in nats, of chosen `[B]` and rejected `[B]` responses, through TRL's fused head."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not getattr(base, "prefscan_fused_head", False):
        add_fused_lm_head(base)
        base.prefscan_fused_head = True
    batch = {key: tensor.to(base.device) for key, tensor in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    chosen, rejected = outputs.log_probs.float().sum(dim=1).chunk(2)
    return chosen, rejected
