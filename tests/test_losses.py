"""Every loss against its paper's formula, written anew in plain floats, and against stock TRL."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prefscan.losses import LOSSES, PairLogps
from tiny import plain_logps, sharegpt_rows


class Row(NamedTuple):
    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: int
    rejected_tokens: int


ORDINARY = Row(-12.5, -20.25, -13.0, -19.0, 7, 9)
LONG = Row(-2000.0, -1850.5, -1990.0, -1900.25, 700, 650)
UNLEARNED = Row(-2000.0, -3.0, -1.0, -2000.0, 800, 1)  # β·margin of −1,600 at β = 0.4, where exp() overflows
EQUAL = Row(-8.0, -8.0, -8.0, -8.0, 3, 3)
ONE_TOKEN = Row(-0.25, -4.5, -1.5, -2.25, 1, 1)
WORSE = Row(-30.0, -11.0, -22.0, -14.0, 12, 4)
BATCHES = {
    "one": [ORDINARY],
    "equal": [EQUAL],
    "one_token": [ONE_TOKEN],
    "long": [LONG, UNLEARNED],
    "mixed": [ORDINARY, EQUAL, ONE_TOKEN, WORSE],
}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def formula(loss: str, rows: list[Row], beta: float) -> list[float]:
    """Each paper's loss of every pair of a micro-batch, in plain floats."""
    ratios = [(row.chosen - row.ref_chosen, row.rejected - row.ref_rejected) for row in rows]
    if loss == "sigmoid":
        return [-log_sigmoid(beta * (w - x)) for w, x in ratios]
    if loss == "ipo":
        per_token = [(w / r.chosen_tokens, x / r.rejected_tokens) for (w, x), r in zip(ratios, rows, strict=True)]
        return [((w - x) - 1 / (2 * beta)) ** 2 for w, x in per_token]
    if loss == "ipo_sum":
        return [((w - x) - 1 / (2 * beta)) ** 2 for w, x in ratios]
    assert loss == "kto_pair"
    kl_w, kl_x = (max(0.0, sum(half) / len(rows)) for half in zip(*ratios, strict=True))
    value = [(math.exp(log_sigmoid(beta * (w - kl_x))), math.exp(log_sigmoid(beta * (kl_w - x)))) for w, x in ratios]
    return [((1 - desirable) + (1 - undesirable)) / 2 for desirable, undesirable in value]


def to_logps(rows: list[Row], dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(*(torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)))


def random_rows(seed: int, count: int = 5) -> list[Row]:
    rng = random.Random(seed)
    logps = [[-rng.uniform(0.1, 60.0) for _ in range(4)] for _ in range(count)]
    return [Row(*logps[i], rng.randint(1, 40), rng.randint(1, 40)) for i in range(count)]


def raised(rows: list[Row], field: str, by: float, only: int | None = None) -> list[Row]:
    return [
        row._replace(**{field: getattr(row, field) + by}) if only in (None, i) else row for i, row in enumerate(rows)
    ]


def test_the_registry_names_every_loss() -> None:
    assert set(LOSSES) == {"sigmoid", "ipo", "ipo_sum", "kto_pair"}
    assert all(function.__name__ == name for name, function in LOSSES.items())


@pytest.mark.parametrize("beta", [0.01, 0.4, 0.9])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_papers_formula(loss: str, batch: str, beta: float) -> None:
    rows = BATCHES[batch]
    expected = formula(loss, rows, beta)
    exact = LOSSES[loss](to_logps(rows), beta)
    assert exact.shape == (len(rows),)
    assert exact.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert LOSSES[loss](to_logps(rows, torch.float32), beta).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "at_the_start"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("ipo_sum", 25.0), ("kto_pair", 0.5)]
)
def test_the_value_where_policy_and_reference_agree(loss: str, at_the_start: float) -> None:
    assert LOSSES[loss](to_logps([EQUAL]), 0.1).item() == pytest.approx(at_the_start)


@pytest.mark.parametrize("lift", [-40.0, 0.0, 40.0])  # kto_pair: a lift clamps both KL, or frees both
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences_of_the_formula(loss: str, lift: float) -> None:
    rows = raised(raised(random_rows(seed=1), "chosen", lift), "rejected", lift)
    logps = to_logps(rows)
    fields = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    leaves = [getattr(logps, field).requires_grad_() for field in fields]
    gradients = torch.autograd.grad(LOSSES[loss](logps, 0.3).sum(), leaves)
    step = 1e-5
    for field, gradient in zip(fields, gradients, strict=True):
        for i in range(len(rows)):
            above, below = (sum(formula(loss, raised(rows, field, by, only=i), 0.3)) for by in (step, -step))
            assert gradient[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    logps = to_logps(random_rows(seed=9))
    tokens = (logps.chosen_tokens, logps.rejected_tokens)

    def function(*values: Tensor) -> Tensor:
        return LOSSES[loss](PairLogps(*values, *tokens), 0.2)

    leaves = [value.requires_grad_() for value in (logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_finite_at_extreme_log_probabilities(loss: str) -> None:
    logps = to_logps(BATCHES["long"], torch.float32)
    leaves = [logps.chosen.requires_grad_(), logps.rejected.requires_grad_()]
    gradients = torch.autograd.grad(LOSSES[loss](logps, 0.4).mean(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair"])
def test_a_likelier_chosen_never_costs_and_a_likelier_rejected_never_pays(loss: str, seed: int) -> None:
    rows = random_rows(seed)
    before = LOSSES[loss](to_logps(rows), 0.2)
    for i in range(len(rows)):
        chosen_up = LOSSES[loss](to_logps(raised(rows, "chosen", 1.5, only=i)), 0.2)
        rejected_up = LOSSES[loss](to_logps(raised(rows, "rejected", 1.5, only=i)), 0.2)
        assert (chosen_up <= before).all()
        assert chosen_up[i] < before[i]
        assert (rejected_up >= before).all()
        assert rejected_up[i] > before[i]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("loss", "tokens"), [("ipo", 4), ("ipo_sum", 1)])  # averaged over the response's 4, or summed
def test_ipo_is_smallest_at_its_target_margin(loss: str, tokens: int, beta: float) -> None:
    def value_and_slope(margin: float) -> tuple[float, float]:
        logps = to_logps([Row(-20.0 + tokens * margin, -9.0, -20.0, -9.0, 4, 3)])
        chosen = logps.chosen.requires_grad_()
        value = LOSSES[loss](logps, beta).sum()
        return value.item(), torch.autograd.grad(value, chosen)[0].item()

    target = 1 / (2 * beta)
    below, at, above = (value_and_slope(target + distance) for distance in (-0.5, 0, 0.5))
    assert at == pytest.approx((0, 0), abs=1e-9)
    assert below[0] == pytest.approx(0.25)
    assert above[0] == pytest.approx(0.25)
    assert below[1] < 0 < above[1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_pairs_does_not_matter(loss: str, seed: int) -> None:
    rows = random_rows(seed)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    values = LOSSES[loss](to_logps(rows), 0.3)
    permuted = LOSSES[loss](to_logps([rows[i] for i in order]), 0.3)
    torch.testing.assert_close(permuted, values[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "depends"), [("sigmoid", False), ("ipo", False), ("ipo_sum", False), ("kto_pair", True)]
)
def test_only_kto_pair_depends_on_the_micro_batch(loss: str, depends: bool) -> None:
    alone = LOSSES[loss](to_logps([ORDINARY]), 0.3)[0]
    beside_another = LOSSES[loss](to_logps([ORDINARY, ONE_TOKEN]), 0.3)[0]
    assert (alone != beside_another).item() is depends


def kto_gradients(rows: list[Row], beta: float) -> tuple[Tensor, Tensor]:
    """d loss of pair 0 with respect to every chosen and to every rejected log-probability."""
    logps = to_logps(rows)
    leaves = [logps.chosen.requires_grad_(), logps.rejected.requires_grad_()]
    chosen, rejected = torch.autograd.grad(LOSSES["kto_pair"](logps, beta)[0], leaves)
    return chosen, rejected


def test_kto_pairs_kl_is_not_detached() -> None:
    # Log-ratios: chosen 3 and 1, rejected 2 and −1, so KL_w = 2 and KL_l = 0.5.
    rows = [Row(-7.0, -8.0, -10.0, -10.0, 5, 5), Row(-9.0, -11.0, -10.0, -10.0, 5, 5)]
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
    rows = [Row(-11.0, -12.0, -10.0, -10.0, 5, 5), Row(-14.0, -15.0, -10.0, -10.0, 5, 5)]
    chosen, rejected = kto_gradients(rows, 0.2)
    assert chosen[1].item() == rejected[1].item() == 0
    value = LOSSES["kto_pair"](to_logps(rows), 0.2)[0].item()
    assert value == pytest.approx((2 - math.exp(log_sigmoid(-0.2)) - math.exp(log_sigmoid(0.4))) / 2)


@pytest.fixture(scope="module")
def stock_trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Any]:
    """Stock trl.DPOTrainer over the tiny model, with an adapter that already differs from the base."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": row["conversations"][0]["value"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
        }
        for row in sharegpt_rows(4)
    ]

    def make(loss: str, beta: float) -> Any:
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            loss_type=[loss],
            beta=beta,
            per_device_train_batch_size=4,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
        )
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )

    return make


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_equals_stock_trl_on_the_same_batch(stock_trainer: Callable[[str, float], Any], loss: str, beta: float) -> None:
    trainer = stock_trainer(loss, beta)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        stock = trainer.compute_loss(trainer.model, batch).item()
        pairs = list(trainer.train_dataset)
        policy = [plain_logps(trainer.model, pair) for pair in pairs]
        with trainer.model.disable_adapter():
            reference = [plain_logps(trainer.model, pair) for pair in pairs]
    rows = [
        Row(*map(float, (*p, *r)), len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        for p, r, pair in zip(policy, reference, pairs, strict=True)
    ]
    assert any(row.chosen != row.ref_chosen for row in rows)
    assert LOSSES[loss](to_logps(rows), beta).mean().item() == pytest.approx(stock, rel=1e-5, abs=1e-5)
