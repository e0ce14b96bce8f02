"""How often intervals hold and tests raise a false alarm, in simulated studies: the tables of docs/statistics.md.

    PYTHONPATH=src python benchmarks/interval_coverage.py  # all tables, about 20 minutes on one core
    PYTHONPATH=src python benchmarks/interval_coverage.py gains --studies 500 # one of them

Each study has losses or cells whose truth is known. "Wrong" is the share of all studies that print an interval without
the truth in it (5 % is right), "printed" the share that print one. The Monte-Carlo standard error of 5 % of 1,000
studies is 0.7.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from prefscan.reporting.contrasts import (
    crossed_estimate,
    equal_kl_contrasts,
    form_errors,
    gains,
    group_contrast,
    loss_contrasts,
    near_duplicates,
    own_best_contrasts,
)
from prefscan.reporting.estimates import Estimate, estimate_mean
from prefscan.reporting.frontier import EFFECTIVE, frontier, share_of_possible, tilted
from prefscan.reporting.power import Design, Variances, detectable, detectable_difference

Array = NDArray[np.float64]
Random = np.random.Generator

# Standard deviations of the pilot's kind: a reply's reward 0.19 in all; trainings 0.01.
TRAINING, PROMPT, REPLY = 0.01, 0.04, 0.14


class Rate(NamedTuple):
    """Percentages of all studies: those that printed an interval, and those whose interval misses the truth."""

    printed: float
    wrong: float

    def __str__(self) -> str:
        return f"{self.wrong:.1f}" if self.printed > 99.5 else f"{self.wrong:.1f} ({self.printed:.0f})"


def rate(estimates: Iterator[Estimate], truth: float) -> Rate:
    found = list(estimates)
    printed = [(e.low, e.high) for e in found if e.low is not None and e.high is not None]
    wrong = sum(not low <= truth <= high for low, high in printed)
    return Rate(100 * len(printed) / len(found), 100 * wrong / len(found))


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def heading(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


# Differences of one cell from the base, by prompt: a draw of `[studies, prompts]` and its mean.
def _ties(
    share: float, values: Callable[[Random, tuple[int, int]], Array]
) -> Callable[[Random, tuple[int, int]], Array]:
    return lambda rng, shape: np.where(rng.random(shape) < share, 0.0, values(rng, shape))


def _ceiling(rng: Random, shape: tuple[int, int]) -> Array:
    """Most prompts just below the other, which is at 1, and 15 % far below."""
    return -np.where(rng.random(shape) < 0.85, rng.beta(1, 20, shape), rng.beta(3, 2, shape))


DIFFERENCES: dict[str, tuple[Callable[[Random, tuple[int, int]], Array], float]] = {
    "normal": (lambda rng, shape: rng.normal(0, 1, shape), 0.0),
    "60 % ties, one-sided": (_ties(0.6, lambda rng, shape: rng.exponential(1, shape)), 0.4),
    "60 % ties, whole points": (_ties(0.6, lambda rng, shape: rng.choice([-1.0, 1, 2], shape)), 0.4 * 2 / 3),
    "90 % ties, one-sided": (_ties(0.9, lambda rng, shape: np.ones(shape)), 0.1),
    "skew (lognormal)": (lambda rng, shape: rng.lognormal(0, 1, shape), float(np.exp(0.5))),
    "ceiling": (_ceiling, -(0.85 / 21 + 0.15 * 0.6)),
}
PROMPTS = (8, 20, 50, 128, 256, 600)


def gain_rate(kind: str, prompts: int, studies: int) -> tuple[Rate, float]:
    """Of a cell's gain; and, for comparison, how often Student's t misses, in percent of studies."""
    draw, truth = DIFFERENCES[kind]
    values = draw(np.random.default_rng([prompts, len(kind)]), (studies, prompts))
    means, errors = values.mean(axis=1), stats.sem(values, axis=1)
    missed = abs(means - truth) > stats.t.ppf(0.975, prompts - 1) * errors
    return rate((estimate_mean(study) for study in values), truth), float(100 * missed.mean())


def table_of_gains(studies: int) -> None:
    heading(
        "Gain of one cell over the base: % wrong (% printed, where not all); in square brackets, Student's t",
        "differences",
        *(f"{prompts} prompts" for prompts in PROMPTS),
    )
    for kind in DIFFERENCES:
        found = [gain_rate(kind, prompts, studies) for prompts in PROMPTS]
        row(kind, *(f"{ours} [{t:.1f}]" for ours, t in found))
    cells = 6
    alarms = 0
    rng = np.random.default_rng(1)
    for _ in range(studies):
        base = rng.normal(0.55, 0.1, 128)
        found_gains = gains(base + rng.normal(0, 0.12, (cells, 128)), base, [str(i) for i in range(cells)])
        alarms += any(gain.p_holm is not None and gain.p_holm <= 0.05 for gain in found_gains)
    print(f"\nAny of {cells} equal cells called different from the base after Holm: {100 * alarms / studies:.1f} %")


class Truth(NamedTuple):
    """How two losses of equal mean differ otherwise; the first loss has the awkward part."""

    shape: str = "normal"
    training: float = TRAINING
    unequal: bool = False
    copies: int = 1


TRUTHS = {
    "normal": Truth(),
    "trainings vary much": Truth(training=0.05),
    "trainings do not vary": Truth(training=0.0),
    "unequal variances": Truth(unequal=True),
    "60 % ties, one-sided": Truth("60 % ties, one-sided"),
    "skew (lognormal)": Truth("skew (lognormal)"),
    "ceiling": Truth("ceiling"),
    "near-duplicate cells": Truth(training=0.03, copies=2),
}
SIZES = ((20, 2), (20, 6), (80, 3), (256, 4), (256, 6), (600, 18))


def study(truth: Truth, losses: int, trainings: int, prompts: int, rng: Random) -> Array:
    """Rewards `[losses, trainings, prompts]` of losses with equal expected reward."""
    if truth.shape == "ceiling":
        latent = 3 + rng.normal(0, 1.5, prompts) + rng.normal(0, 0.8, (losses, 1, prompts))
        latent = latent + rng.normal(0, 0.3, (losses, trainings, 1)) + rng.normal(0, 1, (losses, trainings, prompts))
        return np.asarray(1 / (1 + np.exp(-latent)))
    scale = np.where(np.arange(losses) == 0, 4.0, 1.0) if truth.unequal else np.ones(losses)
    draw, mean = DIFFERENCES[truth.shape]
    if truth.shape.endswith("one-sided"):  # nothing but the first loss's difference, where there is one
        rewards = np.zeros((losses, trainings, prompts))
        rewards[0] = 0.1 * draw(rng, (1, prompts)) * (1 + rng.normal(0, 0.1, (trainings, prompts)))
        return rewards
    groups = -(-trainings // truth.copies)
    seeds = rng.normal(0, truth.training, (losses, groups, 1)) + rng.normal(0, REPLY, (losses, groups, prompts))
    seeds = seeds.repeat(truth.copies, axis=1)[:, :trainings] * scale[:, None, None]
    if truth.copies > 1:  # what tells two cells apart is far less than what they share
        seeds = seeds + rng.normal(0, REPLY / 20, seeds.shape)
    own = rng.normal(0, PROMPT, (losses, 1, prompts))
    if truth.shape != "normal":
        own[0] = 0.1 * (draw(rng, (1, prompts)) - mean)
    return np.asarray(rng.normal(0.55, 0.1, prompts) + own + seeds)


def contrast_rate(truth: Truth, prompts: int, trainings: int, studies: int) -> Rate:
    rng = np.random.default_rng([prompts, trainings])
    expected = 0.1 * DIFFERENCES[truth.shape][1] if truth.shape.endswith("one-sided") else 0.0
    rewards = (study(truth, 2, trainings, prompts, rng) for _ in range(studies))
    return rate((crossed_estimate(first - second)[0] for first, second in rewards), expected)


def naive_rate(prompts: int, trainings: int, studies: int, training: float) -> tuple[float, float]:
    """False alarms, in %, of a t test over prompts: of the grid's mean with one seed, and of the best cells."""
    rng = np.random.default_rng([prompts, trainings, 1])
    alarms = np.zeros(2)
    for _ in range(studies):
        rewards = study(Truth(training=0), 2, trainings, prompts, rng) + rng.normal(0, training, (2, 1, 1))
        alarms[0] += stats.ttest_rel(*rewards.mean(axis=1)).pvalue <= 0.05
        nested = study(Truth(training=training), 2, trainings, prompts, rng)
        best = [loss[loss.mean(axis=1).argmax()] for loss in nested]
        alarms[1] += stats.ttest_rel(*best).pvalue <= 0.05
    return tuple(100 * alarms / studies)


def table_of_contrasts(studies: int) -> None:
    sizes = [f"{prompts} prompts, {trainings} trainings" for prompts, trainings in SIZES]
    heading("Contrast of two equal losses over the grid: % wrong (% printed, where not all)", "truth", *sizes)
    for name, truth in TRUTHS.items():
        row(name, *(contrast_rate(truth, prompts, trainings, studies) for prompts, trainings in SIZES))
    rng = np.random.default_rng(2)
    truth, wrong, groups = TRUTHS["near-duplicate cells"], [], 0
    for _ in range(studies):
        rewards = study(truth, 2, 6, 256, rng)
        names = [str(i) for i in range(6)]
        found = near_duplicates((rewards[0] - rewards.mean(axis=(0, 1))), names)
        groups += len(found)
        merged = np.stack([rewards[:, [int(name) for name in group]].mean(axis=1) for group in found], axis=1)
        wrong.append(crossed_estimate(merged[0] - merged[1])[0])
    print(f"\nNear-duplicates averaged into one, 256 prompts, 6 cells: {rate(iter(wrong), 0)} % wrong, ", end="")
    print(f"{groups / studies:.1f} cells a study")
    heading("False alarms of a t test over prompts, %", "prompts, trainings, SD", "grid mean, one seed", "best cells")
    for prompts, trainings, training in ((256, 6, 0.01), (256, 6, 0.03), (80, 18, 0.03)):
        row(f"{prompts}, {trainings}, {training}", *naive_rate(prompts, trainings, studies, training))
    alarms = 0
    for _ in range(studies):
        contrasts = loss_contrasts(study(Truth(), 6, 6, 128, rng), list("abcdef"), nested=True)
        alarms += any(contrast.p_holm is not None and contrast.p_holm <= 0.05 for contrast in contrasts)
    print(f"\nAny of the 15 pairs of 6 equal losses called different after Holm: {100 * alarms / studies:.1f} %")


CURVES: dict[str, Callable[[Array], Array]] = {
    "KL(α − βKL)": lambda kl: kl * (0.041 - 0.0033 * kl),
    "d(α − βd)": lambda kl: np.sqrt(kl) * (0.08 - 0.013 * np.sqrt(kl)),
    "1 − exp(−KL), in no form": lambda kl: 0.13 * (1 - np.exp(-kl / 2)),
}
# Reward minus base and KL of the pilot's seven cells of 48 updates at a learning rate of 1e-3 (sigmoid, ipo, kto_pair).
PILOT = {"gain": [0.027, 0.039, 0.111, 0.114, 0.121, 0.127, 0.132], "kl": [0.69, 1.07, 3.34, 3.87, 5.03, 5.49, 6.71]}


def kl_study(curve: str, trainings: int, prompts: int, training: float, rng: Random) -> tuple[Array, Array]:
    """Gains and KL of three losses on one curve, whose β reach different ranges of KL."""
    kl = np.stack([np.geomspace(low, high, trainings) for low, high in ((0.5, 4), (0.8, 6.5), (0.6, 5))])
    kl = kl * np.exp(rng.normal(0, 0.15, kl.shape))
    rewards = study(Truth(training=training), 3, trainings, prompts, rng)
    return rewards - 0.55 + CURVES[curve](kl)[..., None], kl


def kl_rate(curve: str, trainings: int, prompts: int, training: float, studies: int) -> tuple[Rate, float]:
    rng = np.random.default_rng([trainings, prompts])
    single, alarms = [], 0
    for _ in range(studies):
        found = equal_kl_contrasts(*kl_study(curve, trainings, prompts, training, rng), list("abc"), nested=True)
        single += [contrast.difference for contrast in found[:3]]
        alarms += any(contrast.p_holm is not None and contrast.p_holm <= 0.05 for contrast in found)
    return rate(iter(single), 0), 100 * alarms / studies


def table_of_equal_kl(studies: int) -> None:
    studies //= 2
    sizes = ((4, 256, 0.01), (6, 128, 0.01), (6, 128, 0.03), (18, 128, 0.01))
    heading(
        "Equal KL, equal losses: % wrong of one contrast; after the slash, any of 9 after Holm",
        "true curve",
        *(f"{t} trainings, {p} prompts, SD {sd}" for t, p, sd in sizes),
    )
    for curve in CURVES:
        rates = [kl_rate(curve, t, p, sd, studies) for t, p, sd in sizes]
        row(curve, *(f"{one} / {alarm:.1f}" for one, alarm in rates))
    heading("Leave-one-out error of the curve on the pilot's seven cells", "form", "error of the gain")
    for form, error in form_errors([PILOT["gain"]], [PILOT["kl"]]).items():
        row(form, f"{error:.4f}")


def best_rate(points: int, repeats: int, response: float, training: float, studies: int) -> Rate:
    """Two losses, the second's reward falling by `response` from point to point; the truth is of the points chosen."""
    rng = np.random.default_rng([points, repeats, round(1000 * training), round(1000 * response)])
    names = np.repeat(np.arange(points), repeats)
    fall = np.zeros((2, points * repeats, 1))
    fall[1, :, 0] = -response * names
    estimates = []
    for _ in range(studies):
        rewards = study(Truth(training=training), 2, points * repeats, 256, rng) + fall
        choice = own_best_contrasts(rewards, ["a", "b"], nested=True, points=names)[0]
        truth = response * float(np.mean([point for _, point in choice.points]))
        estimates.append(_shifted(choice.difference, truth))
    return rate(iter(estimates), 0)


def _shifted(estimate: Estimate, truth: float) -> Estimate:
    """The estimate minus a truth that is another in every study."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return estimate._replace(low=estimate.low - truth, high=estimate.high - truth)


def table_of_own_best(studies: int) -> None:
    studies //= 2
    heading(
        "Each loss at its own best point: % wrong about the points chosen, 256 prompts",
        "points × seeds",
        *(f"second falls {fall} a point, SD {sd}" for fall in (0.0, 0.02) for sd in (0.01, 0.03)),
    )
    for points, repeats in ((3, 1), (6, 1), (18, 1), (3, 2), (6, 3)):
        row(
            f"{points} × {repeats}",
            *(best_rate(points, repeats, fall, sd, studies) for fall in (0.0, 0.02) for sd in (0.01, 0.03)),
        )


def group_rate(sizes: tuple[int, int], spread: float, random: bool, studies: int) -> Rate:
    rng = np.random.default_rng([*sizes, round(1000 * spread)])
    first = [i < sizes[0] for i in range(sum(sizes))]
    estimates = []
    for _ in range(studies):
        effects = rng.normal(0, spread, sum(sizes))
        rewards = study(Truth(), sum(sizes), 6, 128, rng) + effects[:, None, None]
        found = group_contrast(rewards, first, random=random)
        truth = 0.0 if random else float(effects[: sizes[0]].mean() - effects[sizes[0] :].mean())
        estimates.append(_shifted(found, truth))
    return rate(iter(estimates), 0)


def table_of_groups(studies: int) -> None:
    studies //= 2
    groups = ((2, 2), (3, 3), (9, 6))
    heading(
        "Groups of losses: % wrong, 6 trainings, 128 prompts",
        "claim, SD between losses of a kind",
        *(f"{a} against {b} losses" for a, b in groups),
    )
    for random in (True, False):
        for spread in (0.0, 0.02):
            name = f"{'kinds (random)' if random else 'these losses (fixed)'}, {spread}"
            row(name, *(group_rate(sizes, spread, random, studies) for sizes in groups))


def possible_study(prompts: int, samples: int, rng: Random, many: int = 4000) -> tuple[Array, Array]:
    """Rewards of samples in (0, 1), skewed and different by prompt, and of `many` more samples of the same prompts."""
    a, b = rng.uniform(1.5, 6, (prompts, 1)), rng.uniform(1.5, 6, (prompts, 1))
    return rng.beta(a, b, (prompts, samples)), rng.beta(a, b, (prompts, many))


def possible_truth(temperature: float, rng: Random) -> tuple[float, float]:
    """Gain and KL of the optimum over all prompts, to about three digits."""
    _, many = possible_study(4000, 1, rng)
    logits = many / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    normaliser = np.log(weights.mean(axis=1)) + logits.max(axis=1)
    reward = (weights * many).sum(axis=1) / weights.sum(axis=1)
    return float((reward - many.mean(axis=1)).mean()), float((reward / temperature - normaliser).mean())


def table_of_possible(studies: int) -> None:
    studies //= 10
    rng = np.random.default_rng(0)
    curve = np.array([possible_truth(t, rng) for t in np.geomspace(1, 0.02, 20)])
    heading(
        "Optimum under a KL constraint from n samples a prompt: its gain minus the most at its KL, in % "
        "(effective samples)",
        "λ, KL, gain",
        *(f"n = {n}" for n in (4, 8, 16, 32)),
    )
    for temperature in (0.5, 0.2, 0.1, 0.06):
        gain, kl = possible_truth(temperature, rng)
        cells = []
        for samples in (4, 8, 16, 32):
            rewards, _ = possible_study(20000, samples, rng, many=1)
            reward, divergence, effective = tilted(rewards, temperature)
            most = float(np.interp(divergence.mean(), curve[:, 1], curve[:, 0]))
            cells.append(f"{100 * ((reward - rewards.mean(axis=1)).mean() / most - 1):+.1f} ({effective.mean():.1f})")
        row(f"{temperature}, {kl:.2f}, {gain:.3f}", *cells)
    print(f"\nPoints with fewer than {EFFECTIVE:.0f} effective samples are not given.")
    heading(
        "Best of n and the share of the possible gain: % wrong, 16 samples",
        "prompts",
        "best of 4",
        "share of 0.5 at KL 0.5",
        "share of 0.5 at KL 1",
    )
    _, many = possible_study(4000, 1, rng)
    best_truth = float(np.sort(many[:, :4000].reshape(4000, 1000, 4), axis=2)[:, :, -1].mean() - many.mean())
    for prompts in (32, 128):
        wrong = np.zeros(3)
        for _ in range(studies):
            rewards, _ = possible_study(prompts, 16, rng, many=1)
            known = frontier(rewards)
            best = known.points[3]
            wrong[0] += not best.gain_low <= best_truth <= best.gain_high
            for i, at in enumerate((0.5, 1.0)):
                truth = 0.5 * float(np.interp(at, curve[:, 1], curve[:, 0]))
                cell = truth + rng.normal(0, 0.15, prompts)
                found = share_of_possible(known, cell, at * (1 + rng.normal(0, 0.5, prompts)))
                assert found.low is not None
                assert found.high is not None
                wrong[1 + i] += not found.low <= 0.5 <= found.high
        row(prompts, *(100 * wrong / studies).tolist())


def table_of_power(studies: int) -> None:
    heading(
        "Designs of three losses, 0.01 between trainings, 0.04 loss × prompt, 0.03 training × prompt, 0.17 a reply",
        "β × steps × seeds, prompts × replies",
        "detects",
        "power found, %",
        "one more seed",
        "one more β",
        "quarter more prompts",
        "one more reply",
    )
    sd = Variances(training=0.01, prompt=0.04, training_prompt=0.03, reply=0.17)
    rng = np.random.default_rng(3)
    for betas, steps, seeds, prompts, replies in DESIGNS:
        design = Design(3, betas, steps, seeds, prompts, replies)
        found = detectable(design, sd)
        power = simulated_power(design, sd, rng, studies)
        name = f"{betas} × {steps} × {seeds}, {prompts} × {replies}"
        row(name, f"{found.difference:.3f}", power, *(f"{value:.3f}" for value in found[1:]))


def simulated_power(design: Design, sd: Variances, rng: Random, studies: int) -> float:
    """How often, in %, the design finds its detectable difference between the first two losses at Holm's first step."""
    difference = detectable_difference(design, sd)
    level = 0.05 / (design.losses * (design.losses - 1) / 2)
    trainings, prompts, found = design.trainings, design.prompts, 0
    names = np.repeat(np.arange(trainings // design.seeds), design.seeds)
    inner = (sd.training_prompt**2 + sd.reply**2 / design.replies) ** 0.5
    for _ in range(studies):
        rewards = rng.normal(0, sd.training, (2, trainings, 1)) + rng.normal(0, sd.prompt, (2, 1, prompts))
        rewards = rewards + rng.normal(0, inner, (2, trainings, prompts))
        p_value = crossed_estimate(rewards[0] + difference - rewards[1], names)[0].p_value
        found += p_value is not None and p_value <= level
    return 100 * found / studies


# β, steps, seeds, prompts, replies.
DESIGNS = (
    (3, 1, 1, 256, 2),
    (4, 1, 1, 128, 2),
    (4, 1, 1, 256, 2),
    (5, 1, 1, 128, 2),
    (6, 1, 1, 64, 2),
    (6, 1, 1, 128, 1),
    (6, 1, 1, 128, 2),
    (6, 1, 1, 256, 2),
    (3, 1, 2, 128, 2),
    (9, 2, 1, 128, 2),
)

TABLES = {
    "gains": table_of_gains,
    "contrasts": table_of_contrasts,
    "equal_kl": table_of_equal_kl,
    "own_best": table_of_own_best,
    "groups": table_of_groups,
    "possible": table_of_possible,
    "power": table_of_power,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="How often intervals hold, in simulated studies.")
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="which tables; all by default")
    parser.add_argument(
        "--studies", type=int, default=1000, help="studies for each figure; half of them in slow tables"
    )
    arguments = parser.parse_args()
    for name in arguments.tables or TABLES:
        TABLES[name](arguments.studies)


if __name__ == "__main__":
    main()
