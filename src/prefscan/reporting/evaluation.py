"""The comparison of losses by the known reward: arrays of all replies, and what statistics make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefscan.common.config import Cell
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl
from prefscan.common.paths import EVALUATE_METRICS, REPLIES, REPORTS, SAMPLES
from prefscan.reporting.contrasts import (
    AtEqualKL,
    Choice,
    Contrast,
    Gain,
    equal_kl_contrasts,
    gains,
    loss_contrasts,
    near_duplicates,
    own_best_contrasts,
)
from prefscan.reporting.frontier import Frontier, Share, frontier, share_of_possible

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """All evaluated cells: rewards `[cells, prompts]`, KL `[cells]` in nats a reply; the base's `[prompts, n]`."""

    cells: list[Cell]
    rewards: Array
    kl: Array
    kl_by_prompt: list[dict[str, float]]
    prompts: list[str]
    base: Array
    metrics: dict[str, dict[str, Any]]
    nested: bool

    @property
    def base_reward(self) -> float:
        return float(self.base.mean())

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(cell.loss for cell in self.cells))

    def by_loss(self) -> tuple[Array, Array, list[str]]:
        """Rewards `[losses, trainings, prompts]`, KL `[losses, trainings]`, and each training's (β, steps).

        The grid is a product, so every loss has the same points.
        """
        points = list(dict.fromkeys(f"{cell.beta}-{cell.steps}" for cell in self.cells))
        place = {(cell.loss, f"{cell.beta}-{cell.steps}"): i for i, cell in enumerate(self.cells)}
        index = np.array([[place[loss, point] for point in points] for loss in self.losses])
        return self.rewards[index], self.kl[index], points


def read_evaluation(cells: Sequence[Cell], nested: bool) -> Evaluation:
    """What the stages sample and evaluate wrote for these cells."""
    base_rows = read_jsonl(SAMPLES / "eval.jsonl")
    prompts = [row["id"] for row in base_rows]
    rewards, kls = [], []
    for cell in cells:
        rows = {row["id"]: row["replies"] for row in read_jsonl(REPLIES / f"{cell.key}.jsonl")}
        rewards.append([fmean(reply["score"] for reply in rows[prompt]) for prompt in prompts])
        known = {p: [r["kl"] for r in rows[p] if r["kl"] is not None] for p in prompts}
        kls.append({prompt: fmean(values) for prompt, values in known.items() if values})
    metrics = {cell.key: read_json(EVALUATE_METRICS / f"{cell.key}.json") for cell in cells}
    return Evaluation(
        cells=list(cells),
        rewards=np.array(rewards),
        kl=np.array([metrics[cell.key]["kl"] for cell in cells]),
        kl_by_prompt=kls,
        prompts=prompts,
        base=np.array([[reply["score"] for reply in row["replies"]] for row in base_rows]),
        metrics=metrics,
        nested=nested,
    )


@dataclass(frozen=True)
class Comparison:
    """Every statistic that the report prints of an evaluation."""

    gains: list[Gain]
    contrasts: list[Contrast]
    at_equal_kl: list[AtEqualKL]
    own_best: list[Choice]
    possible: Frontier
    shares: list[Share]
    alike: list[list[str]]  # cells that are one finding


def one_finding_each(
    found: Evaluation, alike: Sequence[Sequence[str]], rewards: Array, kl: Array, points: list[str]
) -> tuple[Array, Array, list[str]]:
    """The same arrays with points averaged into one where two cells of one loss are alike there.

    Near-duplicate cells counted as two trainings make 8 to 25 % of false alarms (docs/statistics.md).
    """
    group = {point: {point} for point in points}
    point_of = {cell.key: (cell.loss, f"{cell.beta}-{cell.steps}") for cell in found.cells}
    for keys in alike:
        for loss in found.losses:
            together = [point_of[key][1] for key in keys if point_of[key][0] == loss]
            joined = set().union(*(group[point] for point in together))
            for point in joined:
                group[point] = joined
    merged = list({id(members): members for members in group.values()}.values())
    places = [[points.index(point) for point in points if point in members] for members in merged]
    return (
        np.stack([rewards[:, own].mean(axis=1) for own in places], axis=1),
        np.stack([kl[:, own].mean(axis=1) for own in places], axis=1),
        [" and ".join(points[i] for i in own) for own in places],
    )


def compare_losses(found: Evaluation) -> Comparison:
    """Raises UserError where the base's replies are too few, or all rewarded alike."""
    base = found.base.mean(axis=1)
    try:
        possible = frontier(found.base)
    except ValueError as error:
        raise UserError(
            f"{SAMPLES / 'eval.jsonl'}: {error}; set sample.eval_prompts higher, or a reward that tells replies apart"
        ) from None
    above = found.rewards - base
    names = [cell.key for cell in found.cells]
    alike = [group for group in near_duplicates(above, names) if len(group) > 1]
    rewards, kl, points = one_finding_each(found, alike, *found.by_loss())
    several = len(found.losses) > 1
    return Comparison(
        gains=gains(found.rewards, base, names),
        contrasts=loss_contrasts(rewards, found.losses, nested=found.nested) if several else [],
        # A cell whose KL is 0 has not left the base.
        at_equal_kl=equal_kl_contrasts(rewards - base, kl, found.losses, nested=found.nested)
        if several and kl.min() > 0
        else [],
        own_best=own_best_contrasts(rewards, found.losses, nested=found.nested, points=points) if several else [],
        possible=possible,
        shares=[
            share_of_possible(possible, gain, np.full(len(gain), k)) for gain, k in zip(above, found.kl, strict=True)
        ],
        alike=alike,
    )


def cell_table(found: Evaluation, compared: Comparison) -> pd.DataFrame:
    """A row a cell: gain over the base, corrected p, KL, win rate, share of the possible gain, length."""
    rows = []
    for cell, gain, share in zip(found.cells, compared.gains, compared.shares, strict=True):
        metrics = found.metrics[cell.key]
        rows.append(
            {"cell": cell.key, "loss": cell.loss, "beta": cell.beta, "steps": str(cell.steps)}
            | {name: metrics[name] for name in ("reward", "reward_low", "reward_high")}
            | {
                "gain": gain.gain.mean,
                "gain_low": gain.gain.low,
                "gain_high": gain.gain.high,
                "gain_p_holm": gain.p_holm,
            }
            | {name: metrics[name] for name in ("kl", "kl_low", "kl_high", "win_rate", "win_rate_low", "win_rate_high")}
            | {"share": share.share, "share_low": share.low, "share_high": share.high, "share_at_most": share.at_most}
            | {f"reply_{name}": metrics[name] for name in ("mean_tokens", "share_truncated", "repetition")}
        )
    return pd.DataFrame(rows)


def highest(rows: pd.DataFrame, column: str, smallest: bool = False) -> dict[str, Any]:
    """The first row with the greatest value, or the smallest."""
    ordered = rows.sort_values(column, ascending=smallest, kind="stable")
    return {str(name): value for name, value in ordered.iloc[0].items()}


def loss_table(found: Evaluation, cells: pd.DataFrame) -> pd.DataFrame:
    """A row a loss: its mean gain over the grid, the cell with the highest gain, its range of KL."""
    rows = []
    for loss, group in cells.groupby("loss", sort=False):
        best = highest(group, "gain")
        rows.append(
            {
                "loss": loss,
                "mean_gain": group["gain"].mean(),
                "significant": f"{int((group['gain_p_holm'] <= 0.05).sum())} of {len(group)}",
                "best": best["cell"],
                "best_gain": best["gain"],
                "kl_range": f"{group['kl'].min():.2f} to {group['kl'].max():.2f}",
                "win_rate": best["win_rate"],
            }
        )
    return pd.DataFrame(rows)


def contrast_table(compared: Comparison) -> pd.DataFrame:
    """A row a statement about two losses: over the grid, at equal KL, each at its own best point."""
    rows: list[dict[str, Any]] = []

    def add(where: str, first: str, second: str, estimate: Any, p_holm: float | None) -> None:
        rows.append(
            {"losses": f"{first} − {second}", "where": where}
            | {"difference": estimate.mean, "low": estimate.low, "high": estimate.high, "p_holm": p_holm}
            | {"reason": estimate.reason or ""}
        )

    for contrast in compared.contrasts:
        add("mean over the grid", contrast.first, contrast.second, contrast.difference, contrast.p_holm)
    for at in compared.at_equal_kl:
        where = "at equal KL" if at.kl is None else f"at KL {at.kl:.2f}"
        add(where, at.first, at.second, at.difference, at.p_holm)
    for choice in compared.own_best:
        add("each at its own best β", choice.first, choice.second, choice.difference, choice.p_holm)
    return pd.DataFrame(rows)


def possible_table(found: Frontier) -> pd.DataFrame:
    """The curve of what is possible: a row a policy made of the base's samples."""
    return pd.DataFrame([point._asdict() for point in found.points])


PROMPT_REWARDS = REPORTS / "prompts.csv"


def prompt_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """Every model's mean reward of each evaluation prompt, a column a model: all that a paired test needs.

    Empty without cells, as where no reward is known.
    """
    if not cells:
        return pd.DataFrame(columns=["prompt"])
    columns = {"base": read_jsonl(SAMPLES / "eval.jsonl")}
    columns |= {cell.key: read_jsonl(REPLIES / f"{cell.key}.jsonl") for cell in cells}
    rewards = {
        key: {row["id"]: fmean(reply["score"] for reply in row["replies"]) for row in rows}
        for key, rows in columns.items()
    }
    prompts = list(rewards["base"])
    return pd.DataFrame({"prompt": prompts} | {key: [of[p] for p in prompts] for key, of in rewards.items()})
