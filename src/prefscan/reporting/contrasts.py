"""Which loss is better: contrasts over the grid, at equal KL, at each loss's own best point, and between groups.

Rewards are `[losses, trainings, prompts]`: the mean reward of a training's replies to a prompt. Training number t has
the same β, steps and seed for every loss ("nested" seeding), so that losses are paired by training and by prompt.
`points` `[trainings]` names each training's (β, steps) where seeds repeat it. Average near-duplicate trainings into one
before, or there seem to be more trainings than there are. Every interval is for other prompts and other trainings
alike; `benchmarks/interval_coverage.py` measures its coverage, docs/statistics.md has the figures.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from prefscan.reporting.estimates import (
    TIE,
    Estimate,
    Part,
    Spread,
    combined,
    estimate_mean,
    finite,
    from_spread,
    refused,
)
from prefscan.reporting.stats import holm

Array = NDArray[np.float64]
Forms = dict[str, Callable[[Array], Array]]

SHARED_SEED = "all cells share one training seed, so the variance between trainings is not known"
NO_TRAININGS = "one training a loss says nothing of the variance between trainings"
NEAR_DUPLICATE = 0.98  # correlation of per-prompt values above which two cells are one finding
FEWEST_ON_CURVE = 4  # trainings a loss; a curve of two coefficients leaves two degrees of freedom


class Contrast(NamedTuple):
    """`first` minus `second`: in the unit of the reward, Holm's p over all contrasts of the call.

    `training_sd` is the standard deviation of the difference between two trainings; None where it is not known.
    """

    first: str
    second: str
    difference: Estimate
    p_holm: float | None
    training_sd: float | None


class AtEqualKL(NamedTuple):
    """`first` minus `second` where both have the KL `kl`, in nats a reply; None where their ranges do not overlap."""

    first: str
    second: str
    kl: float | None
    difference: Estimate
    p_holm: float | None


class Choice(NamedTuple):
    """`first` minus `second`, each at the point that other prompts and seeds chose; `points` are theirs, by half."""

    first: str
    second: str
    points: tuple[tuple[object, object], ...]
    difference: Estimate
    p_holm: float | None


class Gain(NamedTuple):
    """A cell's mean reward minus the base's: of this training, not of others with other seeds."""

    cell: str
    gain: Estimate
    p_holm: float | None


def _corrected(estimates: Sequence[Estimate]) -> list[float | None]:
    """Holm's adjusted p-values of the estimates that have one."""
    p_values = [estimate.p_value for estimate in estimates if estimate.p_value is not None]
    adjusted = iter(holm(p_values).tolist() if p_values else [])
    return [None if estimate.p_value is None else next(adjusted) for estimate in estimates]


def _repeated(points: ArrayLike | None, trainings: int) -> list[NDArray[np.intp]]:
    """The trainings of each point where every point has two or more, else all trainings as one group."""
    everything = [np.arange(trainings)]
    if points is None:
        return everything
    names = np.asarray(points)
    if names.shape != (trainings,):
        raise ValueError(f"needs a point for each of {trainings} trainings, got the shape {list(names.shape)}")
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    return groups if min(map(len, groups)) > 1 else everything


def training_parts(values: Array, groups: Sequence[NDArray[np.intp]]) -> tuple[Part, float]:
    """Variances of a single training of `[trainings, prompts]`: of its mean over prompts, and of that the noise's part.

    Mean squares within each group of trainings that only the seed tells apart, pooled. In one group of all trainings
    they hold the effect of the point too, which makes the interval wider.
    """
    prompts = values.shape[1]
    between, noise, freedom = 0.0, 0.0, 0
    for group in groups:
        block = values[group]
        means = block.mean(axis=1)
        rest = block - means[:, None] - block.mean(axis=0) + block.mean()
        between += float(((means - means.mean()) ** 2).sum())
        noise += float((rest**2).sum()) / (prompts - 1) / prompts
        freedom += len(group) - 1
    return Part(between / freedom, freedom), noise / freedom


def crossed_estimate(values: ArrayLike, points: ArrayLike | None = None) -> tuple[Estimate, float | None]:
    """The mean of `[trainings, prompts]` for other trainings and prompts, and the SD between trainings.

    Trainings crossed with prompts, both random (Searle, Casella and McCulloch 1992); see `Spread` for the interval.
    """
    array = finite(values, "[trainings, prompts]")
    trainings, prompts = array.shape
    if trainings < 2:
        return refused(float(array.mean()), NO_TRAININGS), None
    if prompts < 2:
        return estimate_mean(array.mean(axis=0)), None
    between, noise = training_parts(array, _repeated(points, trainings))
    part = Part(between.variance / trainings, between.freedom)
    sd = max(between.variance - noise, 0.0) ** 0.5
    return estimate_mean(array.mean(axis=0), part, noise / trainings), sd


def _by_loss(rewards: ArrayLike, losses: Sequence[str]) -> Array:
    array = finite(rewards, "[losses, trainings, prompts]")
    if len(losses) != len(array):
        raise ValueError(f"needs a name for each of {len(array)} losses, got {len(losses)}")
    return array


def loss_contrasts(
    rewards: ArrayLike, losses: Sequence[str], *, nested: bool, points: ArrayLike | None = None
) -> list[Contrast]:
    """Each pair of losses over the whole grid: mean difference of `[losses, trainings, prompts]`, Holm over the pairs.

    Without nested seeds there is no interval: a t test over prompts alone calls equal losses different in far more than
    5 % of studies (`benchmarks/interval_coverage.py contrasts`).
    """
    array = _by_loss(rewards, losses)
    pairs = list(combinations(range(len(losses)), 2))
    found = [
        crossed_estimate(array[a] - array[b], points)
        if nested
        else (refused(float((array[a] - array[b]).mean()), SHARED_SEED), None)
        for a, b in pairs
    ]
    adjusted = _corrected([estimate for estimate, _ in found])
    return [
        Contrast(losses[a], losses[b], estimate, p, sd)
        for (a, b), (estimate, sd), p in zip(pairs, found, adjusted, strict=True)
    ]


def group_contrast(
    rewards: ArrayLike, in_first: Sequence[bool], *, points: ArrayLike | None = None, random: bool = True
) -> Estimate:
    """Mean of a group of losses minus the mean of the others, such as pairwise minus pointwise losses.

    `rewards` `[losses, trainings, prompts]`, `in_first` `[losses]`. With `random` the losses are a sample of each kind,
    and the claim is about kinds: Welch's (1947) variance between losses, plus what trainings and prompts do to a whole
    group. Without it the claim is about these losses alone.
    """
    array = finite(rewards, "[losses, trainings, prompts]")
    chosen = np.asarray(in_first, dtype=bool)
    groups = [array[chosen], array[~chosen]]
    if chosen.shape != (len(array),) or not all(map(len, groups)):
        raise ValueError(f"needs a loss in each of two groups, got {chosen.tolist()} for {len(array)} losses")
    difference = groups[0].mean(axis=0) - groups[1].mean(axis=0)
    fixed, _ = crossed_estimate(difference, points)
    if not random or fixed.standard_error is None:
        return fixed
    if min(map(len, groups)) < 2:
        return refused(fixed.mean, "a group of one loss says nothing of other losses of its kind")
    # Between losses, and the part of trainings and prompts that it already holds.
    parts = [Part(float(g.mean(axis=(1, 2)).var(ddof=1)) / len(g), len(g) - 1) for g in groups]
    own = sum(
        _variance_of_mean(loss - group.mean(axis=0)) / (len(group) * (len(group) - 1))
        for group in groups
        for loss in group
    )
    common = Part(max(fixed.standard_error**2 - own, 0.0), min(difference.shape) - 1)
    return from_spread(fixed.mean, Spread(common, trainings=combined(parts)))


def _variance_of_mean(values: Array) -> float:
    """Of `[trainings, prompts]`, crossed: the unbiased variance of the mean for other trainings and prompts."""
    trainings, prompts = values.shape
    between, noise = training_parts(values, [np.arange(trainings)])
    return float(values.mean(axis=0).var(ddof=1)) / prompts + (between.variance - noise) / trainings


# Columns of a linear model of the gain over the base, by KL in nats; all but the last are 0 at KL 0.
FORMS: Forms = {
    "d(α − βd), d = √KL": lambda kl: np.stack([kl**0.5, -kl], axis=-1),  # best-of-n of Gao et al. 2023
    "d(α − β log d), d = √KL": lambda kl: np.stack([kl**0.5, -(kl**0.5) * np.log(kl**0.5)], axis=-1),  # their RL
    "KL(α − βKL)": lambda kl: np.stack([kl, -(kl**2)], axis=-1),
    "α + β log KL": lambda kl: np.stack([np.ones_like(kl), np.log(kl)], axis=-1),
}


def form_errors(gains: ArrayLike, kl: ArrayLike) -> dict[str, float]:
    """Root mean square error of each form of `FORMS` at the training left out of the fit, over all losses.

    `gains` `[losses, trainings]` over the base, `kl` of the same shape, in nats a reply; needs three trainings a loss.
    """
    y, x = finite(gains, "[losses, trainings]"), finite(kl, "[losses, trainings]")
    if y.shape != x.shape or y.shape[1] < 3 or x.min() <= 0:
        raise ValueError(f"needs three trainings a loss with a KL above 0, got {list(y.shape)} and {list(x.shape)}")
    errors = {}
    for name, columns in FORMS.items():
        design = columns(x)
        hat = design @ np.linalg.pinv(design)
        residuals = y - (hat @ y[..., None])[..., 0]
        leverage = np.diagonal(hat, axis1=1, axis2=2)
        errors[name] = float(np.sqrt(((residuals / np.maximum(1 - leverage, 1e-9)) ** 2).mean()))
    return errors


class _Curve(NamedTuple):
    """A loss's gain at one KL `[prompts]`, the variance that trainings about the curve leave in it, and the noise's."""

    per_prompt: Array
    trainings: Part
    noise: float


def _on_curve(gains: Array, kl: Array, at: float, columns: Callable[[Array], Array]) -> _Curve:
    """Least squares of `[trainings, prompts]` on the form's columns, read at one KL."""
    trainings, prompts = gains.shape
    design = columns(kl)
    inverse = np.linalg.pinv(design)
    weights = columns(np.array([at]))[0] @ inverse
    residuals = gains - design @ (inverse @ gains)
    means, freedom = residuals.mean(axis=1), trainings - design.shape[1]
    rest = float(((residuals - means[:, None]) ** 2).sum()) / (prompts - 1)
    size = float(weights @ weights) / freedom
    return _Curve(weights @ gains, Part(size * float((means**2).sum()), freedom), size * rest / prompts)


def equal_kl_contrasts(
    gains: ArrayLike,
    kl: ArrayLike,
    losses: Sequence[str],
    *,
    nested: bool,
    at: Sequence[float] | None = None,
    form: str | None = None,
) -> list[AtEqualKL]:
    """Each pair of losses at equal KL from the base: difference of their curves of gain against KL.

    `gains` `[losses, trainings, prompts]` over the base; `kl` `[losses, trainings]` in nats a reply, whose own error is
    taken as none. `at` is by default the ends and the geometric middle of the range that both losses of a pair reach.
    `form` names one of `FORMS`; by default that with the smallest error at trainings left out, one for all losses. The
    error holds prompts and the trainings' scatter about each loss's curve, the losses' taken as independent. Holm's
    correction is over all pairs and values of KL.
    """
    array, x = _by_loss(gains, losses), finite(kl, "[losses, trainings]")
    if x.shape != array.shape[:2] or x.min() <= 0:
        raise ValueError(f"needs a KL above 0 for each training, got the shape {list(x.shape)}, least {x.min()}")
    enough = array.shape[1] >= FEWEST_ON_CURVE
    name = form or (_best_form(array.mean(axis=2), x) if enough else next(iter(FORMS)))
    found: list[tuple[str, str, float | None, Estimate]] = []
    for a, b in combinations(range(len(losses)), 2):
        low, high = max(x[a].min(), x[b].min()), min(x[a].max(), x[b].max())
        overlap = low < high
        targets: list[float | None] = [None]
        if at is not None:
            targets = list(at)
        elif overlap:
            targets = np.geomspace(low, high, 3).tolist()
        for target in targets:
            estimate = refused(float("nan"), f"KL reaches {_range(x[a])} and {_range(x[b])}: no KL is common to both")
            if overlap and target is not None:
                inside = low * (1 - 1e-9) <= target <= high * (1 + 1e-9)
                if not nested:
                    estimate = refused(float("nan"), SHARED_SEED)
                elif not enough:
                    estimate = refused(float("nan"), f"a curve needs {FEWEST_ON_CURVE} trainings a loss")
                elif inside:
                    first, second = (_on_curve(array[i], x[i], target, FORMS[name]) for i in (a, b))
                    estimate = estimate_mean(
                        first.per_prompt - second.per_prompt,
                        combined([first.trainings, second.trainings]),
                        first.noise + second.noise,
                    )
                else:
                    estimate = refused(float("nan"), f"both losses reach KL {low:.2g} to {high:.2g} only")
            found.append((losses[a], losses[b], target, estimate))
    adjusted = _corrected([estimate for *_, estimate in found])
    return [AtEqualKL(*row, p) for row, p in zip(found, adjusted, strict=True)]


def _best_form(gains: Array, kl: Array) -> str:
    errors = form_errors(gains, kl)
    return min(errors, key=errors.__getitem__)


def _range(kl: Array) -> str:
    return f"{kl.min():.2g} to {kl.max():.2g}"


def own_best_contrasts(
    rewards: ArrayLike, losses: Sequence[str], *, nested: bool, points: ArrayLike | None = None
) -> list[Choice]:
    """Each pair of losses, each at its own best point: chosen on one half, tested on the other, both ways.

    `rewards` `[losses, trainings, prompts]`. The halves are of prompts (drawn with seed 0), and of seeds where each
    point has two trainings or more; then every (prompts, seeds) quarter chooses for the opposite one. With one training
    a point its luck is in both halves of the prompts; the variance between trainings is then taken from the pair's
    differences over all points, which is too much where the losses differ in their dependence on β.
    """
    array = _by_loss(rewards, losses)
    _, trainings, prompts = array.shape
    names = np.arange(trainings) if points is None else np.asarray(points)
    labels = list(dict.fromkeys(names.tolist()))
    groups = [np.flatnonzero(names == label) for label in labels]
    repeated = min(map(len, groups)) > 1
    order = np.random.default_rng(0).permutation(prompts)
    halves = [order[: prompts // 2], order[prompts // 2 :]]
    seeds = [[g[: len(g) // 2] for g in groups], [g[len(g) // 2 :] for g in groups]] if repeated else [groups, groups]
    folds = [(half, seed) for half in (0, 1) for seed in ((0, 1) if repeated else (0,))]
    tested = np.zeros((len(losses), prompts))
    picks: list[list[object]] = [[] for _ in losses]
    for half, seed in folds:
        for i, reward in enumerate(array):
            scores = [reward[np.ix_(group, halves[half])].mean() for group in seeds[seed]]
            best = int(np.argmax(scores))
            picks[i].append(labels[best])
            other = halves[1 - half]
            tested[i, other] += reward[np.ix_(seeds[1 - seed][best], other)].mean(axis=0) / (1 + repeated)
    shares = max((1 / len(f) + 1 / len(s)) / 4 for f, s in zip(*seeds, strict=True)) if repeated else 1.0
    found = []
    pairs = list(combinations(range(len(losses)), 2))
    for a, b in pairs:
        difference = tested[a] - tested[b]
        if not nested or trainings < 2:
            found.append(refused(float(difference.mean()), NO_TRAININGS if nested else SHARED_SEED))
            continue
        values = [array[a], array[b]] if repeated else [array[a] - array[b]]
        parts = [training_parts(value, _repeated(points if repeated else None, trainings)) for value in values]
        total = combined([part for part, _ in parts])
        noise = sum(shared for _, shared in parts)
        found.append(estimate_mean(difference, Part(shares * total.variance, total.freedom), shares * noise))
    return [
        Choice(losses[a], losses[b], tuple(zip(picks[a], picks[b], strict=True)), estimate, p)
        for (a, b), estimate, p in zip(pairs, found, _corrected(found), strict=True)
    ]


def gains(cells: ArrayLike, base: ArrayLike, names: Sequence[str]) -> list[Gain]:
    """Each cell of `[cells, prompts]` minus the base `[prompts]`, paired by prompt, Holm over the cells."""
    array, reference = finite(cells, "[cells, prompts]"), finite(base, "[prompts]")
    if array.shape != (len(names), len(reference)):
        raise ValueError(f"needs {len(names)} cells over {len(reference)} prompts, got the shape {list(array.shape)}")
    found = [estimate_mean(cell - reference) for cell in array]
    return [Gain(*row) for row in zip(names, found, _corrected(found), strict=True)]


def near_duplicates(values: ArrayLike, names: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[list[str]]:
    """The groups of cells in which every two correlate above the threshold: complete linkage, in the order given.

    `values` `[cells, prompts]` are gains over the base or margins; rewards would correlate by the prompts alone. Cells
    whose values do not vary are one only with cells of the same values.
    """
    array = finite(values, "[cells, prompts]")
    if len(array) < 2:
        return [[name] for name in names]
    centred = array - array.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    varies = norms > TIE
    unit = centred / np.where(varies, norms, 1)[:, None]
    correlation = np.where(np.outer(varies, varies), unit @ unit.T, 0.0)
    correlation[(abs(array[:, None] - array) <= TIE).all(axis=2)] = 1
    distance = squareform(np.clip(1 - correlation, 0, None), checks=False)
    labels = fcluster(linkage(distance, "complete"), 1 - threshold, "distance").tolist()
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(label, []).append(name)
    return list(groups.values())
