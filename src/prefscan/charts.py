"""The report's charts, as Altair objects over the table of cells."""

from typing import Any

import altair as alt
import pandas as pd

# Okabe and Ito's colours, told apart under every common colour blindness; the shape says the same as the colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]
PANEL = {"width": 300, "height": 240}


def _loss_colour(cells: pd.DataFrame) -> Any:
    losses = list(dict.fromkeys(cells["loss"]))
    return alt.Color("loss:N", scale=alt.Scale(domain=losses, range=COLOURS[: len(losses)]), title="loss")


def _against_beta(
    cells: pd.DataFrame, value: str, low: str | None, high: str | None, title: str, rule: float, rule_name: str
) -> alt.FacetChart:
    """A line a loss and a panel a step count; a dashed rule for the base."""
    # Points at one β would hide each other's intervals: set the losses side by side, a little apart.
    losses = list(dict.fromkeys(cells["loss"]))
    spread = 0.02 * (cells["beta"].max() - cells["beta"].min() or 1)
    data = cells.assign(
        x=cells["beta"] + [spread * (losses.index(loss) - (len(losses) - 1) / 2) for loss in cells["loss"]], base=rule
    )
    x = alt.X("x:Q", title="β", scale=alt.Scale(zero=False, nice=True))
    y = alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False))
    tooltip = ["cell:N", alt.Tooltip(f"{value}:Q", format=".3f")]
    chart = alt.Chart()
    layers = [
        chart.mark_line(opacity=0.6).encode(x=x, y=y, color=_loss_colour(cells)),
        chart.mark_point(filled=True, size=60).encode(
            x=x, y=y, color=_loss_colour(cells), shape="loss:N", tooltip=tooltip
        ),
        chart.mark_rule(strokeDash=[5, 3], color="#666666").encode(y="mean(base):Q"),
    ]
    if low and high:
        bars = chart.mark_rule(opacity=0.7).encode(
            x=x, y=alt.Y(f"{low}:Q", title=title), y2=f"{high}:Q", color=_loss_colour(cells)
        )
        layers.insert(0, bars)
    return (
        alt.layer(*layers, data=data)
        .properties(**PANEL)
        .facet(column=alt.Column("steps:N", title="optimizer steps"))
        .properties(title=f"dashed: {rule_name}")
    )


def score_against_beta(cells: pd.DataFrame, base_score: float) -> alt.FacetChart:
    """The study's first figure: MT-Bench score against β, with 95 % intervals over questions."""
    return _against_beta(
        cells, "score", "score_low", "score_high", "MT-Bench score (1 to 10)", base_score, "base model"
    )


def accuracy_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Held-out reward accuracy with 95 % Wilson intervals; the base's is one half by definition."""
    return _against_beta(
        cells, "accuracy", "accuracy_low", "accuracy_high", "held-out reward accuracy", 0.5, "base model (0.5)"
    )


def margin_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Held-out margin, log-probability gained by chosen over rejected against the base, with 95 % t intervals."""
    return _against_beta(cells, "margin", "margin_low", "margin_high", "held-out margin (nats)", 0.0, "base model (0)")


def scores_by_category(scores: pd.DataFrame) -> alt.LayerChart:
    """The study's second figure: the base and the highest-scoring cell of each loss, by category.

    `scores` has a row a model and category: `model`, `category`, `score`.
    """
    models = list(dict.fromkeys(scores["model"]))
    colour = alt.Color(
        "model:N", scale=alt.Scale(domain=models, range=["#666666", *COLOURS][: len(models)]), title=None
    )
    y = alt.Y("category:N", title=None)
    x = alt.X("score:Q", title="MT-Bench score (1 to 10)", scale=alt.Scale(zero=False))
    line = alt.Chart(scores).mark_rule(opacity=0.25).encode(y=y, x=alt.X("min(score):Q"), x2="max(score):Q")
    points = (
        alt.Chart(scores)
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(y=y, x=x, color=colour, shape="model:N", tooltip=["model:N", "category:N", "score:Q"])
    )
    return (line + points).properties(width=420, height=alt.Step(34))


def training_curves(curves: pd.DataFrame) -> alt.FacetChart:
    """Loss and reward margin of each micro-batch against the update; the scales differ by loss.

    `curves` has `cell`, `loss_name`, `beta`, `step`, `loss` and `reward_margin`.
    """
    long = curves.melt(
        id_vars=["cell", "loss_name", "beta", "step"],
        value_vars=["loss", "reward_margin"],
        var_name="quantity",
        value_name="value",
    )
    long["quantity"] = long["quantity"].str.replace("_", " ")
    return (
        alt.Chart(long)
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("step:Q", title="update", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("beta:O", title="β", scale=alt.Scale(scheme="viridis")),
            detail="cell:N",
            tooltip=["cell:N", "step:Q", "value:Q"],
        )
        .properties(width=220, height=150)
        .facet(column=alt.Column("loss_name:N", title=None), row=alt.Row("quantity:N", title=None))
        .resolve_scale(y="independent")
    )
