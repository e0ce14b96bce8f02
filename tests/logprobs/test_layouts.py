"""Each layout is what the protocol says: the functions, their sizes, and what they refuse."""

import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from prefscan import logprobs
from prefscan.common.config import Train
from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import Layout, lengths_of, load_layout
from tiny import random_pairs

LAYOUTS = get_args(Train.model_fields["layout"].annotation)
FUNCTIONS = [name for name, member in vars(Layout).items() if inspect.isfunction(member) and not name.startswith("_")]
LENGTHS = [(9, 4, 5), (3, 2, 30), (7, 7, 7), (20, 1, 1), (5, 5, 5)]


def test_the_layouts_are_modules_of_the_folder() -> None:
    modules = {module.name for module in pkgutil.iter_modules(logprobs.__path__)}
    assert {"packed", "padded"} == set(LAYOUTS) <= modules
    assert len(FUNCTIONS) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layout_has_each_function_with_the_protocols_parameters(layout: str, name: str) -> None:
    expected = list(inspect.signature(getattr(Layout, name)).parameters)[1:]  # without self
    assert list(inspect.signature(getattr(load_layout(layout), name)).parameters) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_says_whether_training_may_replace_pefts_layer(layout: str) -> None:
    assert load_layout(layout).FUSED_LORA is (layout == "packed")


def test_lengths_are_of_prompt_chosen_and_rejected() -> None:
    assert [lengths_of(pair) for pair in random_pairs(LENGTHS)] == LENGTHS


@pytest.mark.parametrize("size", [1, 2, 5])
def test_positions_are_those_of_the_row_or_rows(size: int) -> None:
    pairs, lengths = random_pairs(LENGTHS)[:size], LENGTHS[:size]
    packed, padded = (load_layout(name) for name in ("packed", "padded"))
    assert packed.positions(packed.collate(pairs, 0)) == sum(map(sum, lengths))
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    assert padded.positions(padded.collate(pairs, 0)) == 2 * size * longest


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_most_positions_are_those_of_the_largest_batch_laid_out(layout: str, batch_size: int) -> None:
    pairs = random_pairs(LENGTHS)
    sizes = []
    for first in range(len(pairs)):
        # The longest pair with any others.
        for others in ([*pairs[:first], *pairs[first + 1 :]], [*pairs[first + 1 :], *pairs[:first]]):
            batch = load_layout(layout).collate([pairs[first], *others][:batch_size], 0)
            sizes.append(load_layout(layout).positions(batch))
    assert load_layout(layout).most_positions(pairs, batch_size) >= max(sizes)
    if batch_size == 1 or layout == "padded":
        assert load_layout(layout).most_positions(pairs, batch_size) == max(sizes)


def test_the_largest_batch_of_each_layout() -> None:
    assert load_layout("packed").most_positions(random_pairs(LENGTHS), 2) == (3 + 2 + 30) + (20 + 1 + 1)
    assert load_layout("padded").most_positions(random_pairs(LENGTHS), 2) == 2 * 2 * (3 + 30)
    assert load_layout("padded").most_positions(random_pairs([(9, 4, 5), (3, 31, 2)]), 2) == 2 * 2 * (3 + 31)
    assert load_layout("packed").most_positions(random_pairs(LENGTHS), 99) == sum(map(sum, LENGTHS))


def windowed(window: int | None, **config: Any) -> Any:
    """A model as far as its configuration, with a sliding window."""
    text = SimpleNamespace(sliding_window=window, **config)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(("window", "refused"), [(None, False), (33, False), (32, True)])
def test_only_packed_refuses_a_prompt_and_response_beyond_the_sliding_window(window: int | None, refused: bool) -> None:
    """Of (3, 2, 30), 33 tokens; the pair's three parts together are no text that the model reads."""
    what = {"what": "a response of another", "lower": "data.max_length to less"}
    model, pairs = windowed(window), random_pairs(LENGTHS)
    load_layout("padded").refuse_long(model, pairs, **what)
    if not refused:
        load_layout("packed").refuse_long(model, pairs, **what)
        return
    with pytest.raises(UserError) as caught:
        load_layout("packed").refuse_long(model, pairs, **what)
    assert str(caught.value) == (
        "a response of another has 33 tokens, more than the model's sliding window of 32; lower data.max_length to "
        "less, or set train.layout: padded"
    )


@pytest.mark.parametrize(("layers", "refused"), [("full_attention", False), ("sliding_attention", True)])
def test_a_window_that_no_layer_has_refuses_nothing(layers: str, refused: bool) -> None:
    model = windowed(8, layer_types=["full_attention", layers])
    try:
        load_layout("packed").refuse_long(model, random_pairs(LENGTHS), what="a pair", lower="it")
    except UserError:
        assert refused
    else:
        assert not refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_one_a_pair_and_of_chosen_and_rejected(layout: str, model: Any) -> None:
    module, pairs = load_layout(layout), random_pairs(LENGTHS)
    chosen, rejected = module.pair_logps(model.requires_grad_(False), module.collate(pairs, 2))
    assert chosen.shape == rejected.shape == (len(pairs),)
    assert chosen.dtype == rejected.dtype == torch.float32
    swapped = [pair | {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]} for pair in pairs]
    again, other = module.pair_logps(model, module.collate(swapped, 2))
    torch.testing.assert_close((other, again), (chosen, rejected), atol=1e-4, rtol=0)
