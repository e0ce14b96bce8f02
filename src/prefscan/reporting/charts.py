"""The report's charts, as Altair objects over the table of cells.

Where a chart has a colour a loss, a click in its legend fades the other losses, and so does the parameter `shown`,
which the page sets for all charts at once.
"""

from itertools import pairwise
from typing import Any

import altair as alt
import pandas as pd

# Okabe and Ito's colours, told apart under every common colour blindness; grey for their black, which a dark page
# would hide. The shape says the same as the colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442"]
# Both repeat when they run out; 7 shapes beside 8 or 9 colours make 56 or 63 different marks.
SHAPES = ["circle", "square", "cross", "diamond", "triangle-up", "triangle-down", "triangle-right"]
PANEL = {"width": 300, "height": 240}
MOST_POINTS = 50  # of a training curve; 54 curves of 800 updates would be one green area and an SVG of 18 MB


def _in_order(values: pd.Series) -> list[Any]:
    """Each value once, in the order of the grid; the alphabet would put 16 steps before 8."""
    return list(dict.fromkeys(values))


def _colour_and_shape(names: list[str], field: str, title: str | None, colours: list[str] = COLOURS) -> dict[str, Any]:
    """Two encodings of one field, alike enough for Vega-Lite to draw one legend."""
    return {
        "color": alt.Color(field, scale=alt.Scale(domain=names, range=colours[: len(names)]), title=title),
        "shape": alt.Shape(field, scale=alt.Scale(domain=names, range=SHAPES[: len(names)]), title=title),
    }


# The page's own choice of a loss, beside each chart's legend.
SHOWN = alt.param(name="shown", value="all")


def _faded(field: str, opacity: float, pick: alt.Parameter | None = None) -> alt.OpacityValue:
    """Full opacity for rows that the page shows and that the legend to click on, where there is one, has picked."""
    shown = f"shown == 'all' || datum.{field} == shown"
    test: Any = {"and": [{"param": pick.name}, shown]} if pick else shown
    return alt.OpacityValue(0.06, condition=[{"test": test, "value": opacity}])


def _legend(field: str = "loss") -> alt.Parameter:
    """To be added to the first layer that has the colour: Vega-Lite makes the legend of that layer the one to click."""
    return alt.selection_point(fields=[field], bind="legend", name="pick")


def _note(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, fontSize=11, fontWeight="normal")


def _against_beta(
    cells: pd.DataFrame, value: str, low: str, high: str, title: str, rule: float, rule_name: str
) -> alt.FacetChart:
    """A line a loss and a panel a step count; a dashed rule for the base."""
    # Points at one β would hide each other's intervals: set the losses side by side, a little apart.
    losses, betas = _in_order(cells["loss"]), sorted(set(cells["beta"]))
    gap = min((b - a for a, b in pairwise(betas)), default=betas[0])
    spread = min(0.02 * (betas[-1] - betas[0] or betas[0]), 0.8 * gap / len(losses))
    margin = spread * (len(losses) + 3) / 2
    data = cells.assign(
        x=cells["beta"] + [spread * (losses.index(loss) - (len(losses) - 1) / 2) for loss in cells["loss"]], base=rule
    )
    x = alt.X(
        "x:Q",
        title="β",
        scale=alt.Scale(domain=[betas[0] - margin, betas[-1] + margin], nice=False, zero=False),
        axis=alt.Axis(values=betas, format="~g", labelOverlap=True),
    )
    y = alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False, padding=8))
    loss = _colour_and_shape(losses, "loss:N", "loss")
    tooltip = ["cell:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in (value, low, high))]
    chart = alt.Chart()
    pick = _legend()
    span = {"y": alt.Y(f"{low}:Q", title=title), "y2": f"{high}:Q"}
    layers = [
        chart.mark_rule().encode(x=x, **span, color=loss["color"], opacity=_faded("loss", 0.7, pick)).add_params(pick),
        chart.mark_line().encode(x=x, y=y, color=loss["color"], opacity=_faded("loss", 0.6, pick)),
        chart.mark_point(filled=True, size=60).encode(
            x=x, y=y, tooltip=tooltip, opacity=_faded("loss", 1, pick), **loss
        ),
        chart.mark_rule(strokeDash=[5, 3], color="#666666").encode(y="mean(base):Q"),
    ]
    header = alt.Header(labelExpr="datum.value == 'epoch' ? 'one epoch' : datum.value + ' steps'")
    return (
        alt.layer(*layers, data=data)
        .properties(**PANEL)
        .facet(column=alt.Column("steps:N", title=None, sort=_in_order(cells["steps"]), header=header))
        .properties(title=_note(f"dashed: {rule_name}"))
        .add_params(SHOWN)
    )


def score_against_beta(cells: pd.DataFrame, base_score: float, title: str) -> alt.FacetChart:
    """The study's first figure: MT-Bench score against β, with 95 % intervals over questions."""
    return _against_beta(cells, "score", "score_low", "score_high", title, base_score, "base model")


def accuracy_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Held-out reward accuracy with 95 % Wilson intervals, beside the rule that the shorter response is chosen."""
    return _against_beta(
        cells,
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "held-out reward accuracy",
        float(cells["shorter_accuracy"].iloc[0]),
        "the shorter is chosen",
    )


def margin_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Held-out margin, log-probability gained by chosen over rejected against the base, with 95 % t intervals."""
    return _against_beta(cells, "margin", "margin_low", "margin_high", "held-out margin (nats)", 0.0, "base model (0)")


def _intervals(
    data: pd.DataFrame, value: str, title: str, colour: str, fill: alt.FillOpacity | None = None
) -> list[alt.Chart]:
    """Layers of a plot with a line a cell, a value with its interval, coloured by the column `colour`."""
    names = _in_order(data[colour])
    colours = alt.Scale(domain=names, range=COLOURS[: len(names)])
    by = alt.Color(f"{colour}:N", scale=colours, title=colour)
    pick = _legend(colour)
    place: dict[str, Any] = {
        "y": alt.Y("cell:N", title=None, sort=_in_order(data["cell"]), axis=alt.Axis(labelLimit=220))
    }
    if data.duplicated("cell").any():
        place["yOffset"] = alt.YOffset(f"{colour}:N", sort=names)
    spans = [value, f"{value}_low", f"{value}_high", *(["p_holm"] if "p_holm" in data else [])]
    tooltip = ["cell:N", f"{colour}:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in spans)]
    point: dict[str, Any] = {"color": by, "tooltip": tooltip, "opacity": _faded(colour, 1, pick)}
    if fill is not None:
        point |= {"fillOpacity": fill, "stroke": alt.Stroke(f"{colour}:N", scale=colours, title=colour)}
    scale = alt.Scale(zero=False)
    chart = alt.Chart(data)
    return [
        chart.mark_rule()
        .encode(
            **place,
            x=alt.X(f"{value}_low:Q", title=title, scale=scale),
            x2=f"{value}_high:Q",
            color=by,
            opacity=_faded(colour, 0.7, pick),
        )
        .add_params(pick),
        chart.mark_point(size=70, filled=True).encode(**place, x=alt.X(f"{value}:Q", title=title), **point),
    ]


def differences(cells: pd.DataFrame, title: str, colour: str = "loss") -> alt.LayerChart:
    """A forest plot of paired differences: filled where significant after Holm's correction.

    `cells` has `cell`, `difference`, `difference_low`, `difference_high`, `p_holm` and the column named by `colour`.
    """
    names = ["not significant", "significant"]
    data = cells.assign(verdict=[names[bool(p <= 0.05)] for p in cells["p_holm"]])
    fill = alt.FillOpacity("verdict:O", sort=names, scale=alt.Scale(domain=names, range=[0, 1]), legend=None)
    none = alt.Chart(pd.DataFrame([{"none": 0}])).mark_rule(strokeDash=[5, 3], color="#666666")
    layers = [*_intervals(data, "difference", title, colour, fill), none.encode(x=alt.X("none:Q", title=title))]
    return alt.layer(*layers).properties(width=420, height=alt.Step(22)).add_params(SHOWN)


def scores_by_revision(scores: pd.DataFrame, title: str) -> alt.LayerChart:
    """Each cell's score in each revision; `scores` has `cell`, `revision`, `score`, `score_low` and `score_high`."""
    data = scores[["cell", "revision", "score", "score_low", "score_high"]]
    layers = _intervals(data, "score", title, "revision")
    return alt.layer(*layers).properties(width=420, height=alt.Step(22)).add_params(SHOWN)


def score_against_length(cells: pd.DataFrame, base: tuple[float, float], title: str) -> alt.LayerChart:
    """The score against the mean tokens of a reply, since judges like length; `base` is its `(tokens, score)`."""
    losses = _in_order(cells["loss"])
    loss = _colour_and_shape(losses, "loss:N", "loss")
    pick = _legend()
    x = alt.X("mean_tokens:Q", title="mean tokens a reply", scale=alt.Scale(zero=False, padding=8))
    y = alt.Y("score:Q", title=title, scale=alt.Scale(zero=False, padding=8))
    tooltip = ["cell:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("mean_tokens", "score"))]
    chart = alt.Chart(cells)
    layers = [
        chart.mark_rule()
        .encode(x=x, y=alt.Y("score_low:Q"), y2="score_high:Q", color=loss["color"], opacity=_faded("loss", 0.35, pick))
        .add_params(pick),
        chart.mark_point(filled=True, size=70).encode(
            x=x, y=y, tooltip=tooltip, opacity=_faded("loss", 1, pick), **loss
        ),
        alt.Chart(pd.DataFrame([{"mean_tokens": base[0], "score": base[1], "cell": "base"}]))
        .mark_point(size=90, shape="diamond", color="#666666", strokeWidth=2)
        .encode(x=x, y=y, tooltip=tooltip),
    ]
    return (
        alt.layer(*layers).properties(width=420, height=300, title=_note("open diamond: base model")).add_params(SHOWN)
    )


def category_heat_map(scores: pd.DataFrame, title: str) -> alt.FacetChart:
    """Each cell's score in each category minus the base's; a panel a loss and step count.

    `scores` has `loss`, `beta`, `steps`, `category` and `difference`.
    """
    largest = max(scores["difference"].abs().max(), 1e-9)
    colour = alt.Color(
        "difference:Q",
        title=title,
        # Diverging, told apart under every common colour blindness, and the middle is the base.
        scale=alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True),
        legend=alt.Legend(orient="bottom", gradientLength=260, titleLimit=400),
    )
    steps = _in_order(scores["steps"])
    data = scores.assign(panel=scores["loss"] + ((", " + scores["steps"] + " steps") if len(steps) > 1 else ""))
    return (
        alt.Chart(data)
        .mark_rect()
        .encode(
            x=alt.X("beta:O", title="β"),
            y=alt.Y("category:N", title=None),
            color=colour,
            tooltip=["panel:N", "beta:O", "category:N", alt.Tooltip("difference:Q", format="+.2f")],
        )
        .properties(width=alt.Step(30), height=alt.Step(22))
        .facet(facet=alt.Facet("panel:N", title=None, sort=_in_order(data["panel"])), columns=3)
    )


def scores_by_category(scores: pd.DataFrame, title: str) -> alt.LayerChart:
    """The study's second figure: the base and the highest-scoring cell of each loss, by category.

    `scores` has a row a model and category: `model`, `category`, `score`.
    """
    y = alt.Y("category:N", title=None)
    x = alt.X("score:Q", title=title, scale=alt.Scale(zero=False))
    model = _colour_and_shape(_in_order(scores["model"]), "model:N", None, ["#666666", *COLOURS])
    line = alt.Chart(scores).mark_rule(opacity=0.25).encode(y=y, x=alt.X("min(score):Q"), x2="max(score):Q")
    points = (
        alt.Chart(scores)
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(y=y, x=x, tooltip=["model:N", "category:N", "score:Q"], **model)
    )
    return (line + points).properties(width=420, height=alt.Step(34))


def training_curves(curves: pd.DataFrame) -> alt.FacetChart:
    """Loss and reward margin against the update, in long runs as means over equal spans; the scales differ by loss.

    `curves` has `cell`, `loss_name`, `beta`, `steps`, `step`, `loss` and `reward_margin`.
    """
    span = -(-int(curves["step"].max()) // MOST_POINTS)
    cell = ["cell", "loss_name", "beta", "steps"]
    spans = curves.groupby([*cell, (curves["step"] - 1) // span], sort=False)
    long = (
        spans[["step", "loss", "reward_margin"]]
        .mean()
        .reset_index(cell)
        .melt(id_vars=[*cell, "step"], var_name="quantity", value_name="value")
    )
    long["quantity"] = long["quantity"].str.replace("_", " ")
    steps = _in_order(curves["steps"])
    base = alt.Chart().encode(
        x=alt.X("step:Q", title="update", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        # The light end of the scheme would not show on white.
        color=alt.Color(
            "beta:O", title="β", scale=alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0, 0.85]))
        ),
        detail="cell:N",
        tooltip=["cell:N", "step:Q", "value:Q"],
    )
    opacity = _faded("loss_name", 1)
    dash = alt.StrokeDash("steps:N", title="steps", sort=steps, legend=alt.Legend() if len(steps) > 1 else None)
    note = "a point is one update" if span == 1 else f"a point is the mean of {span} updates"
    return (
        alt.layer(
            base.mark_line().encode(strokeDash=dash, opacity=opacity),
            base.mark_point(filled=True, size=18).encode(opacity=opacity),
            data=long,
        )
        .properties(width=220, height=150)
        .facet(
            column=alt.Column("loss_name:N", title=None, sort=_in_order(curves["loss_name"])),
            row=alt.Row("quantity:N", title=None),
        )
        .resolve_scale(y="independent")
        .properties(title=_note(note))
        .add_params(SHOWN)
    )


def reward_against_kl(cells: pd.DataFrame, possible: pd.DataFrame, base: float, reward: str) -> alt.LayerChart:
    """Mean reward against exact KL, a point a cell with both intervals, and the curve of what the base's samples allow.

    `cells` has `kl` and `reward` with their intervals; `possible` has `kl` and `gain` over the base by `policy`.
    """
    losses = _in_order(cells["loss"])
    loss = _colour_and_shape(losses, "loss:N", "loss")
    pick = _legend()
    x = alt.X("kl:Q", title="exact KL to the base (nats a reply)", scale=alt.Scale(zero=True))
    y = alt.Y("reward:Q", title=reward, scale=alt.Scale(zero=False, padding=8))
    curve = possible.assign(
        reward=base + possible["gain"], low=base + possible["gain_low"], high=base + possible["gain_high"]
    )
    start = pd.DataFrame([{"policy": name, "kl": 0.0, "reward": base} for name in _in_order(curve["policy"])])
    curve = pd.concat([start, curve], ignore_index=True)
    names = alt.Scale(domain=["best of n", "optimum"], range=[[4, 3], [1, 0]])
    tooltip = ["cell:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("reward", "kl", "win_rate"))]
    points = alt.Chart(cells)
    return (
        alt.layer(
            points.mark_rule()
            .encode(
                x=x,
                y=alt.Y("reward_low:Q", title=reward),
                y2="reward_high:Q",
                color=loss["color"],
                opacity=_faded("loss", 0.6, pick),
            )
            .add_params(pick),
            points.mark_rule().encode(
                x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=loss["color"], opacity=_faded("loss", 0.6, pick)
            ),
            alt.Chart(curve)
            .mark_line(color="#666666")
            .encode(x=x, y=y, strokeDash=alt.StrokeDash("policy:N", scale=names, title="possible"), order="kl:Q"),
            points.mark_point(filled=True, size=70).encode(
                x=x, y=y, tooltip=tooltip, opacity=_faded("loss", 1, pick), **loss
            ),
            alt.Chart(pd.DataFrame([{"reward": base}]))
            .mark_rule(strokeDash=[5, 3], color="#666666")
            .encode(y="reward:Q"),
        )
        .properties(
            width=520,
            height=320,
            title=_note(
                "dashed rule: the base; grey curves: what its own samples allow, by best of n and by the optimum"
            ),
        )
        .resolve_scale(color="shared", shape="shared")
        .add_params(SHOWN)
    )


def gain_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Gain in mean reward over the base against β, with 95 % intervals over prompts."""
    return _against_beta(cells, "gain", "gain_low", "gain_high", "gain in mean reward", 0.0, "base model (0)")


def kl_against_beta(cells: pd.DataFrame) -> alt.FacetChart:
    """Exact KL to the base against β, with 95 % intervals over prompts."""
    return _against_beta(cells, "kl", "kl_low", "kl_high", "exact KL (nats a reply)", 0.0, "base model (0)")
