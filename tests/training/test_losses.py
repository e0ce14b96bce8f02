"""Every loss against its paper's formula, written anew in plain floats, and against the trainers of stock TRL."""

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch
import yaml
from pydantic import Field
from torch import Tensor

from prefscan.common.config import Cell, Lora, Losses, Params
from prefscan.common.errors import UserError
from prefscan.docs.reference import generated
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import reference_rows, with_reference
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.training.lora import lora_config
from prefscan.training.losses import LOSSES, Loss, PairLogps, check_losses, document, register
from prefscan.training.trainer import CellSettings, PairTrainer, training_arguments
from tiny import plain_logps, sharegpt_rows
from train_data import QUIET, changed, settings_of

REPOSITORY = Path(__file__).parents[2]
# Each far from its default, so that a test sees whether it is read.
OPTIONS = Losses.model_validate(
    {loss: {} for loss in LOSSES}
    | {
        "exo_pair": {"label_smoothing": 0.02},
        "robust": {"label_smoothing": 0.15},
        "discopop": {"tau": 0.3},
        "simpo": {"gamma": 0.7},
        "cpo": {"alpha": 0.6},
        "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.8},
    }
)


class Row(NamedTuple):
    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: int
    rejected_tokens: int
    kl_logratio: float


ORDINARY = Row(-12.5, -20.25, -13.0, -19.0, 7, 9, 1.5)
LONG = Row(-2000.0, -1850.5, -1990.0, -1900.25, 700, 650, -80.0)
UNLEARNED = Row(-2000.0, -3.0, -1.0, -2000.0, 800, 1, 1990.0)  # β·margin of −1,600 at β = 0.4, where exp() overflows
LEARNED = Row(-3.0, -2000.0, -2000.0, -1.0, 1, 800, 0.0)
IMPOSSIBLE = Row(-2000.0, -2000.0, -2.0, -3.0, 1, 1, -1998.0)
EQUAL = Row(-8.0, -8.0, -8.0, -8.0, 3, 3, 0.0)
ONE_TOKEN = Row(-0.25, -4.5, -1.5, -2.25, 1, 1, 0.5)
WORSE = Row(-30.0, -11.0, -22.0, -14.0, 12, 4, -3.0)
CONFIDENT = Row(-1e-4, -6.0, -1.0, -3.0, 1, 2, 0.25)  # a response of almost all of the probability
BATCHES = {
    "one": [ORDINARY],
    "equal": [EQUAL],
    "one_token": [ONE_TOKEN],
    "confident": [CONFIDENT],
    "long": [LONG, UNLEARNED, LEARNED, IMPOSSIBLE],
    "mixed": [ORDINARY, EQUAL, ONE_TOKEN, WORSE],
}


# The formulas --------------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def logistic(x: float) -> float:
    return math.exp(log_sigmoid(x))


def w(row: Row) -> float:
    return row.chosen - row.ref_chosen


def l(row: Row) -> float:  # noqa: E743
    return row.rejected - row.ref_rejected


def margin(row: Row) -> float:
    return w(row) - l(row)


def average_margin(row: Row) -> float:
    return w(row) / row.chosen_tokens - l(row) / row.rejected_tokens


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def exo_pair(row: Row, beta: float) -> float:
    """KL(p, label) of two distributions over the pair."""
    log_p = (log_sigmoid(beta * margin(row)), log_sigmoid(-beta * margin(row)))
    label = (1 - OPTIONS.exo_pair.label_smoothing, OPTIONS.exo_pair.label_smoothing)
    return sum(math.exp(p) * (p - math.log(q)) for p, q in zip(log_p, label, strict=True))


def nca_pair(row: Row, beta: float) -> float:
    noise = sum(0.5 * log_sigmoid(-beta * ratio) for ratio in (w(row), l(row)))
    return -log_sigmoid(beta * w(row)) - noise


def robust(row: Row, beta: float) -> float:
    epsilon = OPTIONS.robust.label_smoothing
    right, wrong = -log_sigmoid(beta * margin(row)), -log_sigmoid(-beta * margin(row))
    return right * (1 - epsilon) / (1 - 2 * epsilon) - wrong * epsilon / (1 - 2 * epsilon)


def discopop(row: Row, beta: float) -> float:
    x, tau = beta * margin(row), OPTIONS.discopop.tau
    return -log_sigmoid(x) * logistic(-x / tau) + math.exp(-x + log_sigmoid(x / tau))


def orpo(row: Row, beta: float) -> float:
    def log_odds(average: float) -> float:
        return average - math.log1p(-math.exp(average))

    chosen, rejected = row.chosen / row.chosen_tokens, row.rejected / row.rejected_tokens
    return -chosen - beta * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def quantiles(
    rows: list[Row], beta: float, above: Callable[[Row], float], below: Callable[[Row], float]
) -> list[float]:
    pairs = zip(sorted(map(above, rows)), sorted(map(below, rows)), strict=True)
    return [-log_sigmoid(beta * (a - b)) for a, b in pairs]


def token_nll(row: Row, rows: list[Row]) -> float:
    return -row.chosen / mean([float(other.chosen_tokens) for other in rows])


def kto_pair(rows: list[Row], beta: float) -> list[float]:
    kl_w, kl_l = (max(0.0, mean([ratio(row) for row in rows])) for ratio in (w, l))
    return [mean([1 - logistic(beta * (w(row) - kl_l)), 1 - logistic(beta * (kl_w - l(row)))]) for row in rows]


def kto(rows: list[Row], beta: float) -> list[float]:
    kl = max(0.0, mean([row.kl_logratio for row in rows]))
    good = [OPTIONS.kto.desirable_weight * (1 - logistic(beta * (w(row) - kl))) for row in rows]
    bad = [OPTIONS.kto.undesirable_weight * (1 - logistic(beta * (kl - l(row)))) for row in rows]
    return [mean(list(pair)) for pair in zip(good, bad, strict=True)]


def each(formula: Callable[[Row, float], float]) -> Callable[[list[Row], float], list[float]]:
    return lambda rows, beta: [formula(row, beta) for row in rows]


# Each paper's loss of every pair of a micro-batch, in plain floats.
FORMULAS: dict[str, Callable[[list[Row], float], list[float]]] = {
    "sigmoid": each(lambda row, beta: -log_sigmoid(beta * margin(row))),
    "hinge": each(lambda row, beta: max(0.0, 1 - beta * margin(row))),
    "ipo": each(lambda row, beta: (average_margin(row) - 1 / (2 * beta)) ** 2),
    "exo_pair": each(exo_pair),
    "nca_pair": each(nca_pair),
    "robust": each(robust),
    "bco_pair": each(lambda row, beta: -log_sigmoid(beta * w(row)) - log_sigmoid(-beta * l(row))),
    "sppo_hard": each(lambda row, beta: (w(row) - 0.5 / beta) ** 2 + (l(row) + 0.5 / beta) ** 2),
    "aot": lambda rows, beta: quantiles(
        rows, beta, lambda row: row.chosen - row.rejected, lambda row: row.ref_chosen - row.ref_rejected
    ),
    "aot_unpaired": lambda rows, beta: quantiles(rows, beta, w, l),
    "apo_zero": each(lambda row, beta: 1 - logistic(beta * w(row)) + logistic(beta * l(row))),
    "apo_down": each(lambda row, beta: logistic(beta * w(row)) + 1 - logistic(beta * margin(row))),
    "discopop": each(discopop),
    "sft": lambda rows, beta: [token_nll(row, rows) for row in rows],
    "sigmoid_norm": each(lambda row, beta: -log_sigmoid(beta * average_margin(row))),
    "ipo_sum": each(lambda row, beta: (margin(row) - 1 / (2 * beta)) ** 2),
    "kto_pair": kto_pair,
    "simpo": each(
        lambda row, beta: (
            -log_sigmoid(
                beta / row.chosen_tokens * row.chosen - beta / row.rejected_tokens * row.rejected - OPTIONS.simpo.gamma
            )
        )
    ),
    "orpo": each(orpo),
    "cpo": lambda rows, beta: [
        -log_sigmoid(beta * row.chosen - beta * row.rejected) + OPTIONS.cpo.alpha * token_nll(row, rows) for row in rows
    ],
    "kto": kto,
}
# Up with the chosen never costs, up with the rejected never pays.
MONOTONE = {
    *("sigmoid", "hinge", "robust", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sigmoid_norm"),
    *("kto_pair", "kto", "simpo", "orpo", "cpo"),
}
# The log-ratio of the chosen, of 4 tokens, at which the loss is smallest while the rejected one's is 0.
TARGETS: dict[str, Callable[[float], float]] = {
    "ipo": lambda beta: 4 / (2 * beta),
    "ipo_sum": lambda beta: 1 / (2 * beta),
    "exo_pair": lambda beta: math.log((1 - OPTIONS.exo_pair.label_smoothing) / OPTIONS.exo_pair.label_smoothing) / beta,
    "nca_pair": lambda beta: math.log(2) / beta,
    "sppo_hard": lambda beta: 1 / (2 * beta),
}
# Each has a test of its own below.
OF_THEIR_OWN = {"apo_down", "discopop", "sft"}


def evaluate(loss: str, logps: PairLogps, beta: float) -> Tensor:
    options = LOSSES[loss].read_options(getattr(OPTIONS, loss).model_dump())
    return LOSSES[loss](logps, beta, options)


def to_logps(rows: list[Row], dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(*(torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)))


def random_rows(seed: int, count: int = 5) -> list[Row]:
    rng = random.Random(seed)
    logps = [[-rng.uniform(0.1, 60.0) for _ in range(4)] for _ in range(count)]
    return [Row(*logps[i], rng.randint(1, 40), rng.randint(1, 40), rng.uniform(-5, 9)) for i in range(count)]


def raised(rows: list[Row], field: str, by: float, only: int | None = None) -> list[Row]:
    return [
        row._replace(**{field: getattr(row, field) + by}) if only in (None, i) else row for i, row in enumerate(rows)
    ]


def of_ratios(chosen: float, rejected: float) -> list[Row]:
    """One pair with these log-ratios, of 4 tokens each."""
    return [Row(-20.0 + chosen, -20.0 + rejected, -20.0, -20.0, 4, 4, 0.0)]


def value(loss: str, rows: list[Row], beta: float) -> float:
    """The micro-batch's loss, as the trainer takes it."""
    return evaluate(loss, to_logps(rows), beta).mean().item()


# Values and gradients ------------------------------------------------------------------------------


def test_every_loss_has_its_proofs() -> None:
    assert set(FORMULAS) == set(LOSSES)
    assert sorted([*MONOTONE, *TARGETS, *OF_THEIR_OWN]) == sorted(LOSSES)
    assert all(loss.function.__name__ == name for name, loss in LOSSES.items())


@pytest.mark.parametrize("beta", [0.01, 0.4, 0.9])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_papers_formula(loss: str, batch: str, beta: float) -> None:
    rows = BATCHES[batch]
    expected = FORMULAS[loss](rows, beta)
    exact = evaluate(loss, to_logps(rows), beta)
    assert exact.shape == (len(rows),)
    assert exact.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert evaluate(loss, to_logps(rows, torch.float32), beta).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "at_the_start"),
    [
        *((loss, math.log(2)) for loss in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired")),
        *((loss, 2 * math.log(2)) for loss in ("bco_pair", "nca_pair")),
        *((loss, 1.0) for loss in ("hinge", "apo_zero", "apo_down")),
        *((loss, 25.0) for loss in ("ipo", "ipo_sum")),
        ("sppo_hard", 50.0),
        ("discopop", (1 + math.log(2)) / 2),
        ("kto_pair", 0.5),
        ("kto", (1.3 + 0.8) / 4),
    ],
)
def test_the_value_where_policy_and_reference_agree(loss: str, at_the_start: float) -> None:
    assert value(loss, [EQUAL], 0.1) == pytest.approx(at_the_start)


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_of_the_reference_are_those_of_a_policy_that_is_it(loss: str) -> None:
    rows = random_rows(4)
    same = [row._replace(chosen=row.ref_chosen, rejected=row.ref_rejected, kl_logratio=0.0) for row in rows]
    found = evaluate(loss, to_logps(rows).of_reference(), 0.2)
    assert found.tolist() == pytest.approx(FORMULAS[loss](same, 0.2), rel=1e-12)
    assert found.tolist() != evaluate(loss, to_logps(rows), 0.2).tolist()


@pytest.mark.parametrize("lift", [-40.0, 0.0, 40.0])  # kto_pair: a lift clamps both KL, or frees both
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences_of_the_formula(loss: str, lift: float) -> None:
    # The reference is lowered: raised log-probabilities would be of probabilities above 1.
    rows = raised(raised(random_rows(seed=1), "ref_chosen", -lift), "ref_rejected", -lift)
    logps = to_logps(rows)
    fields = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    leaves = [getattr(logps, field).requires_grad_() for field in fields]
    total = evaluate(loss, logps, 0.3).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    step = 1e-5
    for field, gradient in zip(fields, gradients, strict=True):
        for i in range(len(rows)):
            above, below = (sum(FORMULAS[loss](raised(rows, field, by, only=i), 0.3)) for by in (step, -step))
            assert gradient[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rows", [BATCHES["long"], [Row(0.0, 0.0, 0.0, 0.0, 1, 2, 0.0)]], ids=["unlikely", "certain"])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_finite_at_extreme_log_probabilities(loss: str, rows: list[Row]) -> None:
    logps = to_logps(rows, torch.float32)
    leaves = [logps.chosen.requires_grad_(), logps.rejected.requires_grad_()]
    values = evaluate(loss, logps, 0.4)
    gradients = torch.autograd.grad(values.mean(), leaves, allow_unused=True, materialize_grads=True)
    assert all(tensor.isfinite().all() for tensor in (values, *gradients))


# Direction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", sorted(MONOTONE))
def test_a_likelier_chosen_never_costs_and_a_likelier_rejected_never_pays(loss: str, seed: int) -> None:
    rows = random_rows(seed)
    before = evaluate(loss, to_logps(rows), 0.2)
    for i in range(len(rows)):
        assert (evaluate(loss, to_logps(raised(rows, "chosen", 0.09, only=i)), 0.2) <= before).all()
        assert (evaluate(loss, to_logps(raised(rows, "rejected", 0.09, only=i)), 0.2) >= before).all()
    assert (
        value(loss, raised(rows, "chosen", 0.09), 0.2)
        < before.mean()
        < value(loss, raised(rows, "rejected", 0.09), 0.2)
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss", TARGETS)
def test_is_smallest_at_its_target(loss: str, beta: float) -> None:
    def value_and_slope(ratio: float) -> tuple[float, float]:
        logps = to_logps(of_ratios(ratio, 0.0))
        chosen = logps.chosen.requires_grad_()
        total = evaluate(loss, logps, beta).sum()
        return total.item(), torch.autograd.grad(total, chosen)[0].item()

    target = TARGETS[loss](beta)
    below, at, above = (value_and_slope(target + distance) for distance in (-0.5, 0, 0.5))
    assert at[1] == pytest.approx(0, abs=1e-9)
    assert below[1] < 0 < above[1]
    assert at[0] < min(below[0], above[0])
    assert value(loss, of_ratios(target, 0.5), beta) > at[0]  # a likelier rejected costs


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_apo_down_costs_with_a_likelier_rejected_and_with_both_likelier(beta: float) -> None:
    for chosen in (-3, 0, 3):
        for rejected in (-9, 0, 9):
            before = value("apo_down", of_ratios(chosen, rejected), beta)
            assert value("apo_down", of_ratios(chosen, rejected + 1), beta) > before
            assert value("apo_down", of_ratios(chosen + 1, rejected + 1), beta) > before
    # A likelier chosen alone costs beside the reference, and pays once it has fallen with the rejected.
    assert value("apo_down", of_ratios(1, -9), beta) > value("apo_down", of_ratios(0, -9), beta)
    assert value("apo_down", of_ratios(-8, -9), beta) < value("apo_down", of_ratios(-9, -9), beta)


def test_discopop_falls_but_for_a_stretch_below_a_margin_of_zero() -> None:
    papers = LOSSES["discopop"].read_options({"tau": 0.05})
    margins = (-20, -5, -2, -0.5, -0.12, 0.07, 0.5, 2, 5, 20)
    values = [LOSSES["discopop"](to_logps(of_ratios(x / 0.1, 0)), 0.1, papers).item() for x in margins]
    falls = [after < before for before, after in pairwise(values)]
    assert falls == [True, True, True, True, False, True, True, True, True]
    assert value("discopop", of_ratios(0, 3), 0.1) == pytest.approx(value("discopop", of_ratios(-3, 0), 0.1))


def test_sft_falls_with_the_chosen_and_does_not_read_the_rejected() -> None:
    rows = random_rows(3)
    assert value("sft", raised(rows, "chosen", 0.09), 0.2) < value("sft", rows, 0.2)
    assert value("sft", raised(rows, "rejected", 1), 0.2) == value("sft", rows, 0.7)


# What a loss reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_reads_the_reference_as_registered(loss: str) -> None:
    rows = random_rows(6)
    nothing = [row._replace(ref_chosen=math.nan, ref_rejected=math.nan) for row in rows]
    found = evaluate(loss, to_logps(nothing), 0.3)
    if LOSSES[loss].reference:
        assert found.isnan().all()
    else:
        assert found.tolist() == evaluate(loss, to_logps(rows), 0.3).tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_reads_the_kl_of_mismatched_responses_as_registered(loss: str) -> None:
    rows = random_rows(6)
    found = evaluate(loss, to_logps([row._replace(kl_logratio=math.nan) for row in rows]), 0.3)
    if LOSSES[loss].mismatched:
        assert found.isnan().all()
    else:
        assert found.tolist() == evaluate(loss, to_logps(rows), 0.3).tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_hyperparameter_is_in_the_schema_and_is_read(loss: str) -> None:
    logps, options = to_logps(random_rows(7)), LOSSES[loss].read_options(getattr(OPTIONS, loss).model_dump())
    assert options.model_fields_set == set(LOSSES[loss].options.model_fields)
    for name, value in options:
        halved = options.model_copy(update={name: value / 2})
        assert not torch.equal(LOSSES[loss](logps, 0.3, halved), evaluate(loss, logps, 0.3))


@pytest.mark.parametrize("loss", LOSSES)
def test_chosen_and_rejected_have_terms_of_their_own_as_registered(loss: str) -> None:
    """Terms of their own add, so that no mixed difference is left; the mixed second derivative of hinge's is 0, too.

    The log-ratios are below 0, where the KL that kto_pair takes from the micro-batch is 0 and no part of the pair.
    """

    def at(chosen: float, rejected: float) -> float:
        return value(loss, of_ratios(chosen, rejected), 0.3)

    places = [(-2.0 * a, -2.0 * b) for a in range(1, 7) for b in range(1, 7)]
    mixed = [at(a, b) - at(a - 1, b) - at(a, b - 1) + at(a - 1, b - 1) for a, b in places]
    if LOSSES[loss].pointwise:
        assert mixed == pytest.approx([0.0] * len(mixed), abs=1e-11)
    else:
        assert max(map(abs, mixed)) > 1e-3


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if name != "hinge"])
def test_the_mixed_second_derivative_of_a_pair_is_as_registered(loss: str) -> None:
    logps = to_logps(of_ratios(-3.0, -5.0))
    chosen, rejected = logps.chosen.requires_grad_(), logps.rejected.requires_grad_()
    total = evaluate(loss, logps, 0.3).sum()
    (slope,) = torch.autograd.grad(total, chosen, create_graph=True)
    mixed = torch.zeros(1, dtype=torch.float64)
    if slope.requires_grad:
        (mixed,) = torch.autograd.grad(slope.sum(), rejected, allow_unused=True, materialize_grads=True)
    assert (mixed.item() == 0) == LOSSES[loss].pointwise


@pytest.mark.parametrize("loss", LOSSES)
def test_beta_is_read_by_all_but_sft(loss: str) -> None:
    logps = to_logps(random_rows(8))
    assert torch.equal(evaluate(loss, logps, 0.3), evaluate(loss, logps, 0.2)) == (loss == "sft")


# The micro-batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_pairs_does_not_matter(loss: str, seed: int) -> None:
    rows = random_rows(seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    values = evaluate(loss, to_logps(rows), 0.3)
    permuted = evaluate(loss, to_logps([rows[i] for i in order]), 0.3)
    # The values of aot and aot_unpaired belong to quantiles, which stay in rising order.
    expected = values if loss in ("aot", "aot_unpaired") else values[order]
    torch.testing.assert_close(permuted, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_value_of_a_pair_depends_on_the_micro_batch_as_registered(loss: str) -> None:
    rows = random_rows(seed=2)
    together = evaluate(loss, to_logps(rows), 0.3)
    alone = torch.cat([evaluate(loss, to_logps([row]), 0.3) for row in rows])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0) == (not LOSSES[loss].batch_dependent)


def kto_gradients(rows: list[Row], beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives of the first pair's value by every chosen and every rejected log-probability."""
    logps = to_logps(rows)
    leaves = [logps.chosen.requires_grad_(), logps.rejected.requires_grad_()]
    chosen, rejected = torch.autograd.grad(evaluate("kto_pair", logps, beta)[0], leaves)
    return chosen, rejected


def test_kto_pairs_kl_is_not_detached() -> None:
    # Log-ratios: chosen 3 and 1, rejected 2 and −1, so KL_w = 2 and KL_l = 0.5.
    rows = [Row(-7.0, -8.0, -10.0, -10.0, 5, 5, 0.0), Row(-9.0, -11.0, -10.0, -10.0, 5, 5, 0.0)]
    beta = 0.2

    def slope(x: float) -> float:
        return math.exp(log_sigmoid(x) + log_sigmoid(-x))

    chosen, rejected = kto_gradients(rows, beta)
    through_kl_w = -beta / 4 * slope(beta * (2 - 2))  # half of the pair's loss, half of the micro-batch's mean
    through_kl_l = beta / 4 * slope(beta * (3 - 0.5))
    assert chosen[1].item() == pytest.approx(through_kl_w)
    assert rejected[1].item() == pytest.approx(through_kl_l)
    assert chosen[0].item() == pytest.approx(-beta / 2 * slope(beta * (3 - 0.5)) + through_kl_w)


def test_kto_pairs_kl_is_clamped_at_zero() -> None:
    # Every log-ratio is negative: both KL are 0, and neither value nor gradient knows of the second pair.
    rows = [Row(-11.0, -12.0, -10.0, -10.0, 5, 5, 0.0), Row(-14.0, -15.0, -10.0, -10.0, 5, 5, 0.0)]
    chosen, rejected = kto_gradients(rows, 0.2)
    assert chosen[1].item() == rejected[1].item() == 0
    found = evaluate("kto_pair", to_logps(rows), 0.2)[0].item()
    assert found == pytest.approx((2 - math.exp(log_sigmoid(-0.2)) - math.exp(log_sigmoid(0.4))) / 2)


def test_kto_pairs_kl_has_a_gradient_at_zero() -> None:
    """Where training begins: torch's clamp passes it on there, as TRL's did, and relu would not."""
    rows = [Row(-10.0, -10.0, -10.0, -10.0, 5, 5, 0.0)] * 2
    chosen, rejected = kto_gradients(rows, 0.2)
    assert chosen.tolist() == pytest.approx([-0.2 * 3 / 16, -0.2 / 16])
    assert rejected.tolist() == pytest.approx([0.2 * 3 / 16, 0.2 / 16])


def test_ktos_kl_is_detached_clamped_at_zero_and_needed() -> None:
    rows = random_rows(4)
    logps = to_logps(rows)
    assert logps.kl_logratio is not None
    logps.kl_logratio.requires_grad_()
    assert logps.kl_logratio.mean() > 0  # not clamped
    assert not evaluate("kto", logps, 0.2).requires_grad
    below, zero = ([row._replace(kl_logratio=kl) for row in rows] for kl in (-3.0, 0.0))
    assert value("kto", below, 0.2) == value("kto", zero, 0.2)
    with pytest.raises(AssertionError, match="kto needs kl_logratio"):
        evaluate("kto", PairLogps(*list(vars(logps).values())[:6]), 0.2)


# Stock TRL -----------------------------------------------------------------------------------------

STOCK = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": [],
    "per_device_train_batch_size": 8,
    "seed": 0,
}
# Every second pair the wrong way round, so that margins of either sign tell the losses apart.
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["conversations"][0]["value"]}],
        "chosen": [{"role": "assistant", "content": row[("chosen", "rejected")[i % 2]]["value"]}],
        "rejected": [{"role": "assistant", "content": row[("rejected", "chosen")[i % 2]]["value"]}],
    }
    for i, row in enumerate(sharegpt_rows(8))
]


@pytest.fixture(scope="module")
def stock_trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A trainer of stock TRL over the tiny model, with an adapter that already differs from the base."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(trainer: Any, config: Any, rows: list[Any] = MESSAGES, **arguments: Any) -> Any:
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=config(output_dir=str(tmp_path_factory.mktemp("trl")), **STOCK | arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            ),
        )

    return make


@torch.no_grad()
def logps_of(trainer: Any, pairs: list[dict[str, Any]]) -> PairLogps:
    """What the losses read, from plain forwards of the trainer's model on its tokens."""
    policy = [plain_logps(trainer.model, pair) for pair in pairs]
    with trainer.model.disable_adapter():
        reference = [plain_logps(trainer.model, pair) for pair in pairs]
    rows = [
        Row(*map(float, (*p, *r)), len(pair["chosen_ids"]), len(pair["rejected_ids"]), 0.0)
        for p, r, pair in zip(policy, reference, pairs, strict=True)
    ]
    assert all(row.chosen != row.ref_chosen for row in rows)
    return to_logps(rows)


TRL = [name for name in LOSSES if name not in ("ipo_sum", "kto_pair", "simpo", "orpo", "cpo", "kto")]
SMOOTHING = {"exo_pair": OPTIONS.exo_pair.label_smoothing, "robust": OPTIONS.robust.label_smoothing}


@pytest.mark.parametrize("loss", TRL)
def test_equals_stock_trl_on_the_same_batch(stock_trainer: Callable[..., Any], loss: str) -> None:
    from trl import DPOConfig, DPOTrainer

    trainer = stock_trainer(
        DPOTrainer,
        DPOConfig,
        loss_type=[loss],
        label_smoothing=SMOOTHING.get(loss, 0.0),
        discopop_tau=OPTIONS.discopop.tau,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    logps = logps_of(trainer, list(trainer.train_dataset))
    others = [evaluate(other, logps, 0.7).mean().item() for other in TRL if other != loss]
    for beta in (0.1, 0.7):
        trainer.beta = beta
        stock = trainer.compute_loss(trainer.model, batch).item()
        assert evaluate(loss, logps, beta).mean().item() == pytest.approx(stock, rel=1e-5, abs=1e-5)
    assert min(abs(other - stock) for other in others) > 1e-3  # this batch tells the losses apart


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("loss", TRL)
def test_the_pair_trainer_has_stock_trls_loss_and_gradients(
    stock_trainer: Callable[..., Any], tiny_model: Path, params: Any, tmp_path: Path, loss: str
) -> None:
    """Both layouts on the adapter and pairs of the stock trainer: options, token counts and layout are in it."""
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from trl import DPOConfig, DPOTrainer

    beta = 0.3
    stock = stock_trainer(
        DPOTrainer,
        DPOConfig,
        loss_type=[loss],
        beta=beta,
        label_smoothing=SMOOTHING.get(loss, 0.0),
        discopop_tau=OPTIONS.discopop.tau,
    )
    pairs = [pair | {"id": str(place)} for place, pair in enumerate(stock.train_dataset)]
    expected = stock.compute_loss(stock.model, next(iter(stock.get_train_dataloader())))
    expected.backward()
    tokenizer, cell = load_tokenizer(tiny_model), Cell(loss=loss, beta=beta, steps=1)
    pad: Any = tokenizer.pad_token_id
    lora = Lora(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    changes = {"lora": lora, "dtype": "fp32", "bnb_4bit_quant_type": "none"}
    for name in ("packed", "padded"):
        layout, model = load_layout(name), load_model(tiny_model, "fp32").requires_grad_(False)
        of_layout = {"layout": name, "per_device_train_batch_size": len(pairs)}
        train, runtime = changed(params.train, QUIET, **changes | of_layout)
        settings = settings_of(cell, OPTIONS, train, runtime)
        rows = with_reference(pairs, list(reference_rows(model, layout, pairs, len(pairs), pad)))
        ours = PairTrainer(
            cell=cell,
            options=settings.options,
            layout=layout,
            pad_token_id=pad,
            kept_tokens=10**6,
            model=model,
            args=training_arguments(settings, 1, False, tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(train),
        )
        set_peft_model_state_dict(ours.model, get_peft_model_state_dict(stock.model))
        found = ours.compute_loss(ours.model, ours.collate(rows))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
        found.backward()
        slopes, wanted = gradients(ours.model), gradients(stock.model)
        assert slopes.keys() == wanted.keys()
        for weight, slope in wanted.items():
            assert (slopes[weight] - slope).norm() <= 1e-4 * slope.norm(), weight


@pytest.mark.parametrize("loss", ["simpo", "cpo"])
def test_equals_stock_cpo_trainer(stock_trainer: Callable[..., Any], loss: str) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = stock_trainer(
        CPOTrainer,
        CPOConfig,
        loss_type={"simpo": "simpo", "cpo": "sigmoid"}[loss],
        simpo_gamma=OPTIONS.simpo.gamma,
        cpo_alpha={"simpo": 0.0, "cpo": OPTIONS.cpo.alpha}[loss],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    logps = logps_of(trainer, labelled_pairs(trainer))
    for beta in (0.1, 0.7):
        trainer.beta = beta
        with torch.no_grad():
            stock = trainer.compute_loss(trainer.model, batch).item()
        assert evaluate(loss, logps, beta).mean().item() == pytest.approx(stock, rel=1e-5, abs=1e-5)


def labelled_pairs(trainer: Any) -> list[dict[str, Any]]:
    """The pairs as CPOTrainer and ORPOTrainer have tokenised them: a prompt's labels are −100."""
    return [
        {"prompt_ids": row["prompt_input_ids"]}
        | {
            f"{name}_ids": [token for token in row[f"{name}_labels"] if token != -100]
            for name in ("chosen", "rejected")
        }
        for row in trainer.train_dataset
    ]


def test_equals_stock_orpo_trainers_odds_ratio(stock_trainer: Callable[..., Any]) -> None:
    """Its cross-entropy is another one: see orpo's text."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = stock_trainer(ORPOTrainer, ORPOConfig)
    batch = next(iter(trainer.get_train_dataloader()))
    logps = logps_of(trainer, labelled_pairs(trainer))
    with torch.no_grad():
        chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
    for beta in (0.1, 0.7):
        trainer.beta = beta
        stock = -trainer.odds_ratio_loss(chosen, rejected)[0].mean().item()
        ours = (evaluate("orpo", logps, beta) + logps.chosen / logps.chosen_tokens).mean().item()
        assert ours == pytest.approx(stock, rel=1e-5, abs=1e-5)


def test_equals_stock_kto_trainer(stock_trainer: Callable[..., Any]) -> None:
    from trl import KTOConfig, KTOTrainer

    # Desirable and undesirable in turns, as many of either: a batch is all pairs.
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in MESSAGES
        for name in ("chosen", "rejected")
    ]
    trainer = stock_trainer(
        KTOTrainer,
        KTOConfig,
        rows,
        per_device_train_batch_size=16,
        desirable_weight=OPTIONS.kto.desirable_weight,
        undesirable_weight=OPTIONS.kto.undesirable_weight,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    examples = list(trainer.train_dataset)
    pairs = [
        {"prompt_ids": good["prompt_ids"], "chosen_ids": good["completion_ids"], "rejected_ids": bad["completion_ids"]}
        for good, bad in zip(examples[::2], examples[1::2], strict=True)
    ]
    # Its mismatched responses; the mean is all that the loss reads.
    mismatched = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["KL_completion_ids"], "rejected_ids": row["completion_ids"]}
        for row in examples
    ]
    kl_logratio = logps_of(trainer, mismatched).chosen_logratio
    assert kl_logratio.mean() > 0.1  # not clamped
    logps = replace(logps_of(trainer, pairs), kl_logratio=kl_logratio)
    for beta in (0.1, 0.7):
        trainer.beta = beta
        stock = trainer.compute_loss(trainer.model, batch).item()
        assert evaluate("kto", logps, beta).mean().item() == pytest.approx(stock, rel=1e-5, abs=1e-5)


# docs/losses.md ------------------------------------------------------------------------------------


def test_the_document_is_current_and_its_table_whole() -> None:
    written = (REPOSITORY / "docs/losses.md").read_text(encoding="utf-8")
    assert written == document() + "\n", "run `prefscan docs`"
    table = [line for line in written.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| `{name}`" for name in LOSSES]
    assert {line.count("|") for line in table} == {9}


# A loss of one's own -------------------------------------------------------------------------------


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> Loss:
    """A loss as a user adds it: one function, and nothing elsewhere."""
    monkeypatch.setitem(LOSSES, "shifted", LOSSES["sigmoid"])  # which takes it out again after the test

    @register(
        formula="−log σ(β(h_w − h_l) − δ)",
        paper="[ODPO](https://arxiv.org/abs/2402.10571), equation 9",
        beta="as in DPO",
    )
    def shifted(
        logps: PairLogps,
        beta: float,
        delta: Annotated[float, Field(ge=0, lt=5, description="offset δ, in β·nats")] = 0.25,
    ) -> Tensor:
        """DPO with an offset."""
        return -torch.nn.functional.logsigmoid(beta * logps.margin - delta)

    return LOSSES["shifted"]


def with_loss(params: Params, given: dict[str, float] | None) -> Params:
    """The parameters with a cell of the added loss, and its section where one is given."""
    grid = params.grid.model_dump() | {"loss": [*params.grid.loss, "shifted"]}
    sections = params.losses.model_dump() | ({} if given is None else {"shifted": given})
    return Params.model_validate(params.model_dump() | {"grid": grid, "losses": sections})


def test_a_loss_is_added_in_one_place(shifted: Loss, params: Params) -> None:
    check_losses(with_loss(params, {"delta": 0.5}))
    key = f"shifted-{params.beta}-{params.steps}"
    settings = CellSettings.of(with_loss(params, {"delta": 0.5}), key)
    assert settings.options.model_dump() == {"delta": 0.5}
    logps = to_logps([ORDINARY])
    expected = -log_sigmoid(0.3 * margin(ORDINARY) - 0.5)
    assert shifted(logps, 0.3, settings.options).item() == pytest.approx(expected)
    assert shifted.read_options({}).model_dump() == {"delta": 0.25}
    assert (shifted.reference, shifted.batch_dependent, shifted.mismatched) == (True, False, False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"delta": 5.0}, r"losses\.shifted\.delta: 5\.0 is refused: input should be less than 5"),
        ({"delta": -0.1}, r"losses\.shifted\.delta: -0\.1 is refused"),
        ({"gamma": 1}, r"losses\.shifted\.gamma: unknown key \(value 1(\.0)?\); delta are known"),
        (None, r"losses\.shifted: missing; `prefscan docs` writes it to conf/losses/papers\.yaml"),
    ],
)
@pytest.mark.usefixtures("shifted")
def test_the_hyperparameters_of_an_added_loss_are_checked(
    given: dict[str, float] | None, words: str, params: Params
) -> None:
    with pytest.raises(UserError, match=words):
        check_losses(with_loss(params, given))


@pytest.mark.usefixtures("shifted")
def test_what_is_written_of_the_registry_has_an_added_loss() -> None:
    files = generated_in(REPOSITORY)
    page = files["docs/losses.md"]
    row = "| `shifted` | −log σ(β(h_w − h_l) − δ) | [ODPO](https://arxiv.org/abs/2402.10571), equation 9 | as in DPO |"
    assert f"{row} `shifted.delta` | yes | no | pairwise |" in page
    assert "### shifted\n\nDPO with an offset." in page
    papers = files["conf/losses/papers.yaml"]
    assert "shifted:\n  delta: 0.25  # offset δ, in β·nats; at least 0, below 5\n" in papers
    assert yaml.safe_load(papers)["shifted"] == {"delta": 0.25}
    names = yaml.safe_load(files["conf/sweep/losses.yaml"])["loss"].split(", ")
    assert names == list(LOSSES)
    assert names[-1] == "shifted"


def generated_in(folder: Path) -> dict[str, str]:
    """What `prefscan docs` would write there, by path."""
    with contextlib.chdir(folder):
        return {path.as_posix(): text for path, text in generated().items()}
