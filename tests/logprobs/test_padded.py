"""TRL's padded layout against the packed one, and against plain forwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prefscan.logprobs import packed, padded
from prefscan.logprobs.layouts import load_layout
from prefscan.models.loading import load_model
from tiny import plain_logps, random_adapter, random_pairs

LENGTHS = [(5, 1, 1), (3, 9, 2), (40, 2, 60), (1, 4, 3), (12, 30, 1), (2, 1, 8)]


@pytest.fixture
def mixed_pairs(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return random_pairs(LENGTHS, vocabulary=250) + pairs[:3]


def padded_logps(model: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    """Shape `[2, pairs]`: chosen, rejected."""
    return torch.stack(padded.pair_logps(model, padded.collate(pairs, 2)))


def test_is_loaded_by_name() -> None:
    assert load_layout("padded") is padded


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_equals_the_packed_layout_and_plain_forwards(
    tiny_model: Path, mixed_pairs: list[dict[str, Any]], size: int, adapter: bool
) -> None:
    models = [load_model(tiny_model, "fp32").requires_grad_(False) for _ in range(2)]
    their_model, our_model = [random_adapter(model) for model in models] if adapter else models
    parts = [mixed_pairs[i : i + size] for i in range(0, len(mixed_pairs), size)]
    with torch.no_grad():
        theirs = torch.cat([padded_logps(their_model, part) for part in parts], dim=1)
        ours = torch.cat([torch.stack(packed.pair_logps(our_model, packed.collate(part, 2))) for part in parts], dim=1)
        plain = torch.stack([torch.stack(plain_logps(our_model, pair)) for pair in mixed_pairs], dim=1)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs, plain, atol=1e-4, rtol=0)


def test_repeated_calls_give_the_same_bits_and_wrap_the_head_once(
    tiny_model: Path, mixed_pairs: list[dict[str, Any]]
) -> None:
    model = random_adapter(load_model(tiny_model, "fp32"))
    first = padded_logps(model, mixed_pairs)
    wrapped = model.get_base_model().forward
    for _ in range(2):
        assert torch.equal(padded_logps(model, mixed_pairs), first)
    assert model.get_base_model().forward == wrapped


def test_gradients_equal_those_of_the_packed_layout(tiny_model: Path, mixed_pairs: list[dict[str, Any]]) -> None:
    gradients = []
    for layout in (padded, packed):
        policy = random_adapter(load_model(tiny_model, "fp32"))
        chosen, rejected = layout.pair_logps(policy, layout.collate(mixed_pairs, 2))
        (chosen - 0.7 * rejected).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    theirs, ours = gradients
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_pad_token_is_never_scored(tiny_model: Path, mixed_pairs: list[dict[str, Any]]) -> None:
    model = load_model(tiny_model, "fp32")
    with torch.no_grad():
        values = [torch.stack(padded.pair_logps(model, padded.collate(mixed_pairs, pad))) for pad in (0, 2, 100)]
    torch.testing.assert_close(values[1], values[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(values[2], values[0], atol=1e-4, rtol=0)
