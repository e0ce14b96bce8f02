"""Every chart is valid Vega-Lite, renders, and shows all of its data and nothing else."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest

from prefscan.reporting import charts
from prefscan.training.losses import LOSSES

GRIDS: dict[str, tuple[list[str], list[float], list[str]]] = {
    "one cell": (["ipo"], [0.3], ["8"]),
    "several β": (["sigmoid", "ipo", "kto_pair"], [0.1, 0.5, 0.9], ["8"]),
    "several steps": (["sigmoid", "ipo"], [0.1], ["8", "16", "epoch"]),
    "the study": (["sigmoid", "ipo", "kto_pair"], [0.01, *(n / 10 for n in range(1, 10))], ["200", "800"]),
    "many losses": ([f"loss{n}" for n in range(8)], [0.1, 0.2], ["1"]),
}


def table(losses: list[str], betas: list[float], steps: list[str]) -> pd.DataFrame:
    """A table of cells as report makes it, each value its own."""
    cells = [(loss, beta, step) for loss in losses for beta in betas for step in steps]
    values = [
        {"cell": f"{loss}-{beta}-{step}", "loss": loss, "beta": beta, "steps": step}
        | {"score": 3 + i / 40, "score_low": 2.5 + i / 40, "score_high": 3.75 + i / 40}
        | {"accuracy": 0.3 + i / 200, "accuracy_low": 0.2 + i / 200, "accuracy_high": 0.35 + i / 200}
        | {"shorter_accuracy": 0.375}
        | {"reward": 0.5 + i / 200, "reward_low": 0.45 + i / 200, "reward_high": 0.6 + i / 200, "win_rate": i / 100}
        | {"gain": i / 100 - 0.1, "gain_low": i / 100 - 0.15, "gain_high": i / 100, "gain_p_holm": 0.5}
        | {"kl": 1 + i / 4, "kl_low": 0.5 + i / 4, "kl_high": 2 + i / 4}
        | {"margin": i - 4.5, "margin_low": i - 6, "margin_high": i - 2}
        | {"difference": i / 50 - 1, "difference_low": i / 50 - 2, "difference_high": i / 50, "p_holm": i % 2 / 10}
        | {"mean_tokens": 40.5 + i}
        for i, (loss, beta, step) in enumerate(cells)
    ]
    return pd.DataFrame(values)


def curves(cells: pd.DataFrame, updates: dict[str, int]) -> pd.DataFrame:
    """Curves whose loss falls and whose margin rises by one a step, apart by cell."""
    parts = []
    for i, cell in enumerate(cells.to_dict("records")):
        step = pd.Series(range(1, updates[cell["steps"]] + 1), name="step")
        part = pd.DataFrame({"step": step, "loss": 1000 * i - step, "reward_margin": 1000.0 * i + step})
        parts.append(part.assign(cell=cell["cell"], loss_name=cell["loss"], beta=cell["beta"], steps=cell["steps"]))
    return pd.concat(parts)


def render(chart: Any) -> str:
    chart.to_dict()  # validates against Vega-Lite's schema
    file = io.StringIO()
    chart.save(file, format="svg")
    return file.getvalue()


def marks(svg: str, kind: str) -> list[str]:
    """The labels of the marks of a kind, which name the values that each of them shows."""
    return [m[1] for m in re.finditer(rf'aria-label="([^"]*)" role="\S+" aria-roledescription="{kind}"', svg)]


def numbers(label: str) -> dict[str, float]:
    """What a mark's label says, but for words."""
    pairs = (part.split(": ", 1) for part in label.replace("−", "-").split("; "))
    return {name: float(value) for name, value in pairs if re.fullmatch(r"[+-]?[\d.]+", value)}


def bars(svg: str, low: str, high: str) -> list[tuple[float, float]]:
    """The ends of the bars whose labels name both, in the order of the table."""
    found = (numbers(label) for label in marks(svg, "rule mark"))
    return [(bar[low], bar[high]) for bar in found if low in bar and high in bar]


def rows(cells: pd.DataFrame, *columns: str) -> list[Any]:
    return [pytest.approx(row, abs=1e-6) for row in cells[list(columns)].itertuples(index=False, name=None)]


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


AGAINST_BETA: dict[str, tuple[Callable[[pd.DataFrame], Any], float]] = {
    "score": (lambda cells: charts.score_against_beta(cells, 5.125, "MT-Bench score (1 to 10)"), 5.125),
    "accuracy": (charts.accuracy_against_beta, 0.375),  # where the shorter is chosen
    "margin": (charts.margin_against_beta, 0),
    "gain": (charts.gain_against_beta, 0),
    "kl": (charts.kl_against_beta, 0),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("value", AGAINST_BETA)
def test_against_beta_shows_every_cell_with_its_interval(value: str, grid: tuple[Any, Any, Any]) -> None:
    draw, base = AGAINST_BETA[value]
    losses, _, steps = grid
    cells = table(*grid)
    svg = render(draw(cells))
    shown = Counter(re.search(r"cell: (\S+); \w+: (\S+);", label).groups() for label in marks(svg, "point"))  # type: ignore[union-attr]
    wanted = {(row["cell"], f"{row[value]:.3f}".replace("-", "−")) for row in cells.to_dict("records")}
    assert shown == Counter(wanted)
    drawn = [re.findall(r": (−?[\d.]+)", label) for label in marks(svg, "rule mark")]
    intervals = sorted((float(b[1].replace("−", "-")), float(b[2].replace("−", "-"))) for b in drawn if len(b) == 3)
    wanted_bars = cells[[f"{value}_low", f"{value}_high"]].itertuples(index=False, name=None)
    assert intervals == [pytest.approx(bar) for bar in sorted(wanted_bars)]
    assert [float(b[0]) for b in drawn if len(b) == 1] == [base] * len(steps)  # the dashed rule of each panel
    assert len(marks(svg, "line mark")) == len(losses) * len(steps)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_against_beta_labels_what_the_grid_holds_in_its_order(grid: tuple[Any, Any, Any]) -> None:
    losses, betas, steps = grid
    found = texts(render(charts.score_against_beta(table(*grid), 5.125, "MT-Bench score (1 to 10)")))
    headers = ["one epoch" if step == "epoch" else f"{step} steps" for step in steps]
    assert [text for text in found if text in headers] == headers
    assert [text for text in found if text in losses] == losses  # one legend, not one for colour and one for shape
    axis = [f"{beta:g}" for beta in betas]
    ticks = [text for text in found[found.index(headers[-1]) + 1 : found.index(losses[0])] if text != "β"]
    assert ticks == axis * len(steps)
    assert "dashed: base model" in found


@pytest.mark.parametrize("grid", [*GRIDS.values(), (list(LOSSES), [n / 10 for n in range(1, 10)], ["1"])])
def test_losses_at_one_beta_stand_side_by_side_near_it(grid: tuple[Any, Any, Any]) -> None:
    _, betas, _ = grid
    cells = table(*grid)
    data = charts.margin_against_beta(cells).data
    assert not data.duplicated(["x", "steps"]).any()
    gap = min((b - a for a, b in pairwise(betas)), default=betas[0])
    assert ((data["x"] - data["beta"]).abs() < gap / 2).all()
    low, high = charts.margin_against_beta(cells).to_dict()["spec"]["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert low < data["x"].min()
    assert data["x"].max() < high


def test_categories_show_every_model_in_every_category() -> None:
    models, categories = ["base", "sigmoid-0.1-8", "ipo-0.5-8", "kto_pair-0.1-8"], ["writing", "math", "stem"]
    scores = pd.DataFrame(
        [
            {"model": model, "category": category, "score": 1 + i + 2.5 * j}
            for i, model in enumerate(models)
            for j, category in enumerate(categories)
        ]
    )
    svg = render(charts.scores_by_category(scores, "MT-Bench score (1 to 10)"))
    shown = Counter(
        (m["model"], m["category"], float(m["score"]))
        for label in marks(svg, "point")
        if (m := dict(part.split(": ", 1) for part in label.split("; ")))
    )
    assert shown == Counter(scores.itertuples(index=False, name=None))
    found = texts(svg)
    assert [text for text in found if text in models] == models
    assert [text for text in found if text in categories] == sorted(categories)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_forest_plot_shows_every_difference_and_fills_the_significant(grid: tuple[Any, Any, Any]) -> None:
    cells = table(*grid)
    svg = render(charts.differences(cells, "points above the base"))
    columns = ["difference", "difference_low", "difference_high", "p_holm"]
    points = {re.search(r"cell: ([^;]+)", label)[1]: numbers(label) for label in marks(svg, "point")}  # type: ignore[index]
    assert list(points) == list(cells["cell"])
    for row in cells.to_dict("records"):
        assert [points[row["cell"]][name] for name in columns] == pytest.approx([row[n] for n in columns], abs=1e-3)
    drawn = re.findall(r'aria-label="[^"]*" role="\S+" aria-roledescription="point"[^>]*>', svg)
    filled = [re.search(r'fill-opacity="(\d)"', mark)[1] for mark in drawn]  # type: ignore[index]
    assert filled == ["1" if p <= 0.05 else "0" for p in cells["p_holm"]]
    assert bars(svg, "points above the base", "difference_high") == rows(cells, "difference_low", "difference_high")
    assert len(marks(svg, "rule mark")) == len(cells) + 1
    assert [text for text in texts(svg) if text in set(cells["cell"])] == list(cells["cell"])  # the axis
    assert svg.count('stroke-dasharray="5,3"') == 1  # no difference


def test_revisions_of_a_cell_stand_side_by_side() -> None:
    cells = table(["sigmoid", "ipo"], [0.1], ["8"])
    both = pd.concat([cells.assign(revision="main"), (cells.assign(revision="tuned", score=cells["score"] + 0.5))])
    for value, title, draw in (
        ("score", "score", charts.scores_by_revision),
        (
            "difference",
            "score minus that in main",
            lambda data, title: charts.differences(data, title, "revision"),
        ),
    ):
        chart = draw(both, title)
        svg = render(chart)
        assert bars(svg, title, f"{value}_high") == rows(both, f"{value}_low", f"{value}_high")
        assert [p["select"]["fields"] for p in chart.to_dict()["params"] if "bind" in p] == [["revision"]]  # the legend
        for layer in chart.to_dict()["layer"][:2]:
            assert "datum.revision == shown" in json.dumps(layer["encoding"]["opacity"])
        drawn = re.findall(
            r'aria-label="([^"]*)" role="\S+" aria-roledescription="point"[^>]* transform="([^"]*)"', svg
        )
        assert len(drawn) == 4
        assert len({re.findall(r"[\d.]+", place)[1] for _, place in drawn}) == 4  # no two at one height
        assert {re.search(r"revision: (\w+)", label)[1] for label, _ in drawn} == {"main", "tuned"}  # type: ignore[index]
        assert [text for text in texts(svg) if text in ("main", "tuned")] == ["main", "tuned"]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_scores_beside_length_show_every_cell_and_the_base(grid: tuple[Any, Any, Any]) -> None:
    cells = table(*grid)
    svg = render(charts.score_against_length(cells, (33.0, 5.125), "score"))
    shown = sorted((found["mean_tokens"], found["score"]) for found in map(numbers, marks(svg, "point")))
    wanted = [(33.0, 5.125), *cells[["mean_tokens", "score"]].itertuples(index=False, name=None)]
    assert shown == [pytest.approx(pair, abs=1e-3) for pair in sorted(wanted)]
    assert bars(svg, "score_low", "score_high") == rows(cells, "score_low", "score_high")
    assert len(marks(svg, "rule mark")) == len(cells)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_reward_beside_kl_shows_every_cell_with_both_intervals_and_what_is_possible(grid: tuple[Any, Any, Any]) -> None:
    cells = table(*grid)
    possible = pd.DataFrame(
        [
            {"policy": policy, "kl": kl, "gain": kl * slope, "gain_low": 0.0, "gain_high": 1.0}
            for policy, slope in (("best of n", 0.1), ("optimum", 0.2))
            for kl in (0.5, 1.0, 2.0)
        ]
    )
    svg = render(charts.reward_against_kl(cells, possible, 0.25, "mean reward"))
    by_name = (dict(part.split(": ", 1) for part in label.split("; ")) for label in marks(svg, "point"))
    found = {point["cell"]: point for point in by_name}
    assert list(found) == list(cells["cell"])
    for row in cells.to_dict("records"):
        for name in ("reward", "kl", "win_rate"):
            assert float(found[row["cell"]][name].replace("−", "-")) == pytest.approx(row[name], abs=6e-4)
    upright = [bar for bar in map(numbers, marks(svg, "rule mark")) if "reward_high" in bar]
    assert sorted(bar["reward_high"] for bar in upright) == [pytest.approx(v) for v in sorted(cells["reward_high"])]
    sideways = [bar for bar in map(numbers, marks(svg, "rule mark")) if "kl_high" in bar]
    assert sorted(bar["kl_high"] for bar in sideways) == [pytest.approx(value) for value in sorted(cells["kl_high"])]
    assert len(marks(svg, "line mark")) == 2
    curve = charts.reward_against_kl(cells, possible, 0.25, "mean reward").layer[2].data
    assert sorted(zip(curve["kl"], curve["reward"], strict=True)) == [
        pytest.approx(pair)
        for pair in sorted(
            [(0.0, 0.25)] * 2 + [(kl, 0.25 + kl * slope) for kl in (0.5, 1.0, 2.0) for slope in (0.1, 0.2)]
        )
    ]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_heat_map_has_a_cell_for_every_category(grid: tuple[Any, Any, Any]) -> None:
    losses, betas, steps = grid
    cells = table(*grid)[["loss", "beta", "steps"]].merge(pd.DataFrame({"category": ["math", "stem"]}), how="cross")
    cells["difference"] = [i / 10 - 1 for i in range(len(cells))]
    svg = render(charts.category_heat_map(cells, "score minus the base's"))
    assert sorted(numbers(label)["difference"] for label in marks(svg, "rect mark")) == [
        pytest.approx(value, abs=0.006) for value in cells["difference"]
    ]
    panels = [f"{loss}, {step} steps" if len(steps) > 1 else loss for loss in losses for step in steps]
    assert [text for text in texts(svg) if text in panels] == panels
    colours = re.findall(r'aria-roledescription="rect mark"[^>]*fill="([^"]*)"', svg)
    assert len(set(colours)) > len(betas)


def test_a_heat_map_is_blue_above_the_base_and_orange_below_alike() -> None:
    cells = table(["ipo"], [0.1, 0.2, 0.3, 0.4], ["8"]).assign(category="math", difference=[-1.0, -0.1, 0.1, 1.0])
    svg = render(charts.category_heat_map(cells, "score minus the base's"))
    fills = re.findall(r'aria-roledescription="rect mark"[^>]*fill="rgb\((\d+), (\d+), (\d+)\)"', svg)
    blue = [int(b) - int(r) for r, _, b in fills]
    assert blue[0] < blue[1] < 0 < blue[2] < blue[3]


def test_a_heat_map_without_differences_is_drawn() -> None:
    cells = pd.DataFrame([{"loss": "ipo", "beta": 0.1, "steps": "8", "category": "math", "difference": 0.0}])
    assert len(marks(render(charts.category_heat_map(cells, "score")), "rect mark")) == 1


def test_a_category_whose_models_agree_is_drawn() -> None:
    scores = pd.DataFrame([{"model": model, "category": "math", "score": 5.0} for model in ("base", "ipo-0.1-8")])
    assert len(marks(render(charts.scores_by_category(scores, "MT-Bench score (1 to 10)")), "point")) == 2


def test_a_loss_keeps_its_colour_from_chart_to_chart() -> None:
    losses = ["sigmoid", "ipo", "kto_pair"]
    cells = table(losses, [0.1], ["8"])
    against = charts.score_against_beta(cells, 5.0, "score").to_dict()["spec"]["layer"][2]["encoding"]["color"]["scale"]
    scores = pd.DataFrame([{"model": name, "category": "math", "score": 5.0} for name in ("base", *cells["cell"])])
    category = charts.scores_by_category(scores, "score").to_dict()["layer"][1]["encoding"]["color"]["scale"]
    assert against["domain"] == losses
    assert category["domain"] == ["base", *cells["cell"]]
    assert category["range"] == ["#666666", *against["range"]]
    assert len(set(category["range"])) == 4


@pytest.mark.parametrize("grid", [GRIDS["one cell"], GRIDS["several β"], GRIDS["several steps"]])
def test_curves_of_short_runs_show_every_update(grid: tuple[Any, Any, Any]) -> None:
    losses, betas, steps = grid
    cells = table(*grid)
    data = curves(cells, {"8": 8, "16": 16, "epoch": 12})
    svg = render(charts.training_curves(data))
    assert len(marks(svg, "point")) == 2 * len(data)
    assert len(marks(svg, "line mark")) == 2 * len(cells)
    found = texts(svg)
    assert "a point is one update" in found
    assert [text for text in found if text in losses] == losses
    assert [text for text in found if text in ("loss", "reward margin")] == ["loss", "reward margin"]
    assert [text for text in found if text == "steps"] == ["steps"] * (len(steps) > 1)
    beta_legend = found[found.index("β") - len(betas) : found.index("β")]
    assert beta_legend == [f"{beta:g}" for beta in betas]


def test_curves_of_losses_with_other_units_have_scales_of_their_own() -> None:
    data = curves(table(["sigmoid", "ipo"], [0.1], ["8"]), {"8": 8})  # values about 0 and about 1,000
    assert {"−8", "992", "8", "1,008"} <= set(
        texts(render(charts.training_curves(data)))
    )  # one scale has no tick there


def test_curves_of_long_runs_are_means_over_equal_spans() -> None:
    cells = table(["sigmoid", "ipo"], [0.1, 0.5], ["200", "800"])
    chart = charts.training_curves(curves(cells, {"200": 200, "800": 800}))
    data = chart.data
    first = data[(data["cell"] == "sigmoid-0.1-200") & (data["quantity"] == "loss")]
    # Spans of 16 updates: their centres, and the means of 0 − step; the last span holds the 8 updates that are left.
    centres = [8.5 + 16 * n for n in range(12)] + [196.5]
    assert list(first["step"]) == centres
    assert list(first["value"]) == [-centre for centre in centres]
    assert len(data) == 2 * 4 * (13 + 50)
    svg = render(chart)
    assert "a point is the mean of 16 updates" in texts(svg)
    assert len(marks(svg, "point")) == len(data)


def test_a_run_of_one_update_shows_its_point() -> None:
    svg = render(charts.training_curves(curves(table(["ipo"], [0.1], ["1"]), {"1": 1})))
    assert len(marks(svg, "point")) == 2


def test_every_loss_has_its_own_mark() -> None:
    cells = table(list(LOSSES), [0.1], ["8"])
    svg = render(charts.score_against_beta(cells, 5.125, "MT-Bench score (1 to 10)"))
    points = re.findall(r'aria-roledescription="point"[^>]* d="([^"]*)"[^>]*fill="([^"]*)"', svg)
    assert len(points) == len(set(points)) == len(LOSSES)
