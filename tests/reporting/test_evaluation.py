"""The comparison by a known reward, of files whose numbers are known: each value by numpy and scipy, from the files."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from prefscan.common.config import Cell
from prefscan.common.errors import UserError
from prefscan.reporting.evaluation import (
    Comparison,
    Evaluation,
    cell_table,
    compare_losses,
    contrast_table,
    loss_table,
    possible_table,
    prompt_table,
    read_evaluation,
)
from reward_data import BASE_REPLIES, EFFECTS, PROMPTS, REPLIES, write_evaluation
from sweep_data import BETAS, CELLS, LOSSES

GRID = [Cell(loss=loss, beta=beta, steps=8) for loss in LOSSES for beta in BETAS]
T39 = stats.t.ppf(0.975, PROMPTS - 1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    write_evaluation(root)
    return root


@pytest.fixture(autouse=True)
def work(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small evaluation as the working directory; do not write to it."""
    monkeypatch.chdir(evaluated)


@pytest.fixture
def found() -> Evaluation:
    return read_evaluation(GRID, nested=True)


@pytest.fixture
def compared(found: Evaluation) -> Comparison:
    return compare_losses(found)


def replies(path: str, name: str) -> np.ndarray:
    """Of every reply `[prompts, replies]`, from a file."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return np.array([[reply[name] for reply in row["replies"]] for row in rows], dtype=float)


def scores(key: str) -> np.ndarray:
    return replies("data/samples/eval.jsonl" if key == "base" else f"data/replies/{key}.jsonl", "score")


def known_gains(key: str) -> np.ndarray:
    return np.asarray(scores(key).mean(axis=1) - scores("base").mean(axis=1))


def holm(p_values: list[float]) -> list[float]:
    """By its definition."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(np.argsort(p_values)):
        largest = max(largest, (len(p_values) - place) * p_values[i])
        corrected[i] = min(largest, 1.0)
    return corrected


def test_what_is_read_is_what_the_files_hold(found: Evaluation) -> None:
    assert [cell.key for cell in found.cells] == CELLS
    assert found.losses == [*LOSSES]
    assert found.base.shape == (PROMPTS, BASE_REPLIES)
    assert found.base_reward == pytest.approx(scores("base").mean())
    assert found.rewards == pytest.approx(np.array([scores(key).mean(axis=1) for key in CELLS]))
    for key, kl, by_prompt in zip(CELLS, found.kl, found.kl_by_prompt, strict=True):
        measured = replies(f"data/replies/{key}.jsonl", "kl")
        assert kl == pytest.approx(np.nanmean(measured))
        assert list(by_prompt.values()) == pytest.approx(measured[~np.isnan(measured)])
        assert len(by_prompt) == 16


def test_prompts_are_paired_by_their_names_and_not_by_their_places(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(tmp_path)
    path = tmp_path / f"data/replies/{CELLS[0]}.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    monkeypatch.chdir(tmp_path)
    assert read_evaluation(GRID, nested=True).rewards == pytest.approx(found.rewards)
    assert list(prompt_table(GRID)[CELLS[0]]) == pytest.approx(found.rewards[0])


def test_losses_have_their_trainings_in_one_order(found: Evaluation) -> None:
    """Whatever the order of the grid, as with β within steps."""
    order = [2, 1, 0, 3]
    shuffled = read_evaluation([GRID[i] for i in order], nested=True)
    rewards, kl, points = shuffled.by_loss()
    assert shuffled.losses == ["ipo", "sigmoid"]
    assert points == ["0.1-8", "0.5-8"]
    for i, loss in enumerate(shuffled.losses):
        for j, beta in enumerate(BETAS):
            place = CELLS.index(f"{loss}-{beta}-8")
            assert rewards[i, j] == pytest.approx(found.rewards[place])
            assert kl[i, j] == found.kl[place]


def test_the_gain_of_a_cell_is_paired_by_prompt(found: Evaluation, compared: Comparison) -> None:
    table = cell_table(found, compared)
    assert list(table["cell"]) == CELLS
    tests = [stats.ttest_1samp(known_gains(key), 0) for key in CELLS]
    for row, key, test in zip(table.to_dict("records"), CELLS, tests, strict=True):
        gain, interval = known_gains(key), test.confidence_interval()
        assert row["gain"] == pytest.approx(gain.mean())
        # The interval is Student's t with a correction for skewness, which moves its ends and keeps its width.
        assert row["gain_high"] - row["gain_low"] == pytest.approx(interval.high - interval.low, rel=0.1)
        assert abs(row["gain_low"] - interval.low) < 0.2 * (interval.high - interval.low)
        assert row["reward"] == pytest.approx(scores(key).mean())
        assert row["reward_high"] - row["reward"] == pytest.approx(T39 * stats.sem(scores(key).mean(axis=1)))
        kls = replies(f"data/replies/{key}.jsonl", "kl")
        kls = kls[~np.isnan(kls)]
        assert row["kl"] == pytest.approx(kls.mean())
        assert row["kl_high"] - row["kl"] == pytest.approx(stats.t.ppf(0.975, 15) * stats.sem(kls))
        ours, theirs = (
            replies(f"data/{name}.jsonl", "utility")[:, :REPLIES] for name in (f"replies/{key}", "samples/eval")
        )
        assert row["win_rate"] == pytest.approx((ours > theirs).mean())
        assert row["reply_share_truncated"] == replies(f"data/replies/{key}.jsonl", "truncated").mean()
        assert (row["loss"], row["beta"], row["steps"]) == (key.split("-")[0], float(key.split("-")[1]), "8")


def test_p_values_are_corrected_over_the_cells(compared: Comparison) -> None:
    raw = [gain.gain.p_value for gain in compared.gains]
    assert all(p is not None for p in raw)
    assert [gain.p_holm for gain in compared.gains] == pytest.approx(holm([p or 0.0 for p in raw]))
    clear = [stats.ttest_1samp(known_gains(key), 0).pvalue for key in CELLS]
    for gain, p in zip(compared.gains, clear, strict=True):
        assert (gain.gain.p_value or 0) < 0.05 or p > 0.01  # a t test says much the same


def test_losses_are_compared_over_prompts_and_trainings(compared: Comparison) -> None:
    table = contrast_table(compared)
    over_grid = table[table["where"] == "mean over the grid"]
    pairs = list(combinations(LOSSES, 2))
    assert list(over_grid["losses"]) == [f"{a} − {b}" for a, b in pairs]
    row = over_grid.iloc[0]
    apart = np.array(
        [scores(f"sigmoid-{beta}-8").mean(axis=1) - scores(f"ipo-{beta}-8").mean(axis=1) for beta in BETAS]
    )
    assert row["difference"] == pytest.approx(apart.mean())
    between = apart.mean(axis=1).var(ddof=1) / 2
    rest = apart - apart.mean(axis=0) - apart.mean(axis=1, keepdims=True) + apart.mean()
    noise = (rest**2).sum() / (PROMPTS - 1) / PROMPTS / 2
    of_prompts = apart.mean(axis=0).var(ddof=1) / PROMPTS
    quantiles = T39**2, stats.t.ppf(0.975, 1) ** 2
    half = max(
        quantiles[0] * of_prompts + quantiles[1] * max(between - noise, 0),
        quantiles[0] * max(of_prompts - noise, 0) + quantiles[1] * between,
    )
    assert row["high"] - row["low"] == pytest.approx(2 * half**0.5, rel=0.1)  # skewness moves it a little
    assert row["p_holm"] > 0.05


def test_what_cannot_be_compared_says_why(found: Evaluation, compared: Comparison) -> None:
    table = contrast_table(compared)
    assert list(table["where"].str.partition(" ")[0]) == ["mean", *["at"] * 3, "each"]
    for row in table[table["where"].str.startswith("at ")].to_dict("records"):
        assert row["reason"] == "a curve needs 4 trainings a loss"
        assert np.isnan(row["difference"])
    ends = [max(found.kl[:2].min(), found.kl[2:].min()), min(found.kl[:2].max(), found.kl[2:].max())]
    assert [at.kl for at in compared.at_equal_kl] == pytest.approx([ends[0], (ends[0] * ends[1]) ** 0.5, ends[1]])
    shared = contrast_table(compare_losses(read_evaluation(GRID, nested=False)))
    assert set(shared["reason"]) == {
        "all cells share one training seed, so the variance between trainings is not known"
    }
    assert shared["low"].isna().all()
    assert shared["difference"].iloc[0] == pytest.approx(table["difference"].iloc[0])


def test_one_loss_is_compared_with_none() -> None:
    alone = compare_losses(read_evaluation(GRID[:2], nested=True))
    assert alone.contrasts == alone.at_equal_kl == alone.own_best == []
    assert contrast_table(alone).empty
    assert [gain.cell for gain in alone.gains] == CELLS[:2]


def test_the_possible_gain_is_that_of_the_bases_own_samples(found: Evaluation, compared: Comparison) -> None:
    table = possible_table(compared.possible)
    base = scores("base")
    best = table[table["policy"] == "best of n"].set_index("parameter")
    assert list(best.index) == list(range(1, BASE_REPLIES + 1))
    everything = np.array([[base[:, list(drawn)].max(axis=1).mean() for drawn in combinations(range(BASE_REPLIES), 3)]])
    assert best.loc[3, "gain"] == pytest.approx(everything.mean() - base.mean())
    assert best.loc[8, "gain"] == pytest.approx(base.max(axis=1).mean() - base.mean())
    assert best.loc[8, "kl"] == pytest.approx(np.log(8) - 7 / 8)
    last = table["kl"].max()
    for key, share in zip(CELLS, compared.shares, strict=True):
        kl = EFFECTS[key][1] + np.mean([i / 100 for i in range(16)])
        if kl > last:
            assert share.share is None
            assert share.at_most == pytest.approx(known_gains(key).mean() / table["gain"].max())
        else:
            assert share.share is not None
    known = cell_table(found, compared)
    assert list(known["share"].notna()) == [share.share is not None for share in compared.shares]
    assert {True, False} == {*known["share"].notna()}


def test_a_row_a_loss_sums_its_cells_up(found: Evaluation, compared: Comparison) -> None:
    cells = cell_table(found, compared)
    table = loss_table(found, cells)
    assert list(table["loss"]) == [*LOSSES]
    for row in table.to_dict("records"):
        gains = {key: known_gains(key).mean() for key in CELLS if key.startswith(f"{row['loss']}-")}
        best = max(gains, key=gains.__getitem__)
        assert row["mean_gain"] == pytest.approx(np.mean([*gains.values()]))
        assert row["best"] == best
        assert row["best_gain"] == pytest.approx(gains[best])
        kls = [EFFECTS[key][1] + 0.075 for key in gains]
        assert row["kl_range"] == f"{min(kls):.2f} to {max(kls):.2f}"
        own = cells[cells["loss"] == row["loss"]]
        assert row["significant"] == f"{(own['gain_p_holm'] <= 0.05).sum()} of 2"


def test_cells_with_the_same_replies_are_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(tmp_path)
    first, second = (tmp_path / f"data/replies/{key}.jsonl" for key in CELLS[:2])
    second.write_text(first.read_text())
    monkeypatch.chdir(tmp_path)
    assert compare_losses(read_evaluation(GRID, nested=True)).alike == [CELLS[:2]]


def test_the_reward_of_each_prompt_is_kept_for_pairing() -> None:
    table = prompt_table(GRID)
    assert list(table.columns) == ["prompt", "base", *CELLS]
    assert list(table["prompt"]) == [f"p{i}" for i in range(PROMPTS)]
    for key in ("base", *CELLS):
        assert list(table[key]) == pytest.approx(scores(key).mean(axis=1))
    assert list(prompt_table([]).columns) == ["prompt"]
    assert len(prompt_table([])) == 0


def test_rewards_that_never_vary_end_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a checkable reward whose instructions no reply of the base follows."""
    write_evaluation(tmp_path)
    path = tmp_path / "data/samples/eval.jsonl"
    rows: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for reply in row["replies"]:
            reply["score"] = 0.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="every prompt's samples have one reward"):
        compare_losses(read_evaluation(GRID, nested=True))


def test_tables_are_of_numbers() -> None:
    found = read_evaluation(GRID, nested=True)
    table = cell_table(found, compare_losses(found))
    words = {"cell", "loss", "steps"}
    assert all(pd.api.types.is_numeric_dtype(table[name]) for name in table.columns.difference([*words]))
