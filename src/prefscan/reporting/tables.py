"""The report's tables, from the metrics of each cell: differences, costs, the judge check, the pairs left out."""

from collections import defaultdict
from collections.abc import Sequence
from io import StringIO
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import pandas as pd

from prefscan.common.config import Cell
from prefscan.common.io import read_json, read_text
from prefscan.common.paths import (
    ANSWER_COST,
    ANSWER_METRICS,
    CURVES,
    EVALUATE_COST,
    MERGE_METRICS,
    REPORTS,
    TRAIN_COST,
    TRAIN_METRICS,
)
from prefscan.reporting.findings import question_scores
from prefscan.reporting.pages import Table
from prefscan.reporting.stats import holm, length_controlled_difference, paired_difference, variance_components


class Estimate(Protocol):
    """A mean with its 95 % interval."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def span(name: str) -> list[str]:
    """The columns of a value and its interval."""
    return [name, f"{name}_low", f"{name}_high"]


def spanned(name: str, found: Estimate) -> dict[str, float]:
    return dict(zip(span(name), (found.mean, found.low, found.high), strict=True))


def with_interval(name: str, heading: str, form: str = "{:.2f}") -> dict[str, tuple[str, str]]:
    """Heading and form of a value's columns and its interval's."""
    return {column: (text, form) for column, text in zip(span(name), (heading, "95 % low", "95 % high"), strict=True)}


HELDOUT = ("shorter_accuracy", "balanced_accuracy", "margin_per_token", "chosen_shift", "rejected_shift")


def training_row(cell: Cell) -> dict[str, Any]:
    """One row of the table of cells: parameters, held-out metrics, what the merge kept."""
    key = cell.key
    train, merge = read_json(TRAIN_METRICS / f"{key}.json"), read_json(MERGE_METRICS / f"{key}.json")
    held = train["heldout"]
    return {
        "cell": key,
        "loss": cell.loss,
        "beta": cell.beta,
        "steps": str(cell.steps),
        **{name: held[name] for value in ("accuracy", "margin", "loss_change") for name in span(value)},
        **{name: held[name] for name in HELDOUT if name in held},
        "margin_kept": merge["margin_kept"],
        "merge_pairs": merge["pairs"],
        "weights_changed": merge["weights_changed"],
        **{name: merge[name] for name in span("margin_answering") if name in merge},
    }


def answer_row(cell: Cell, mtbench: dict[str, Any]) -> dict[str, Any]:
    """What MT-Bench adds to a cell's row: scores, and what its answers are like."""
    answer = read_json(ANSWER_METRICS / f"{cell.key}.json")
    return {
        "cell": cell.key,
        **score_columns(mtbench),
        "share_truncated": answer["share_truncated"],
        "mean_tokens": answer["mean_tokens"],
        "repetition": answer["repetition"],
    }


def score_columns(mtbench: dict[str, Any]) -> dict[str, float]:
    return {
        "score": mtbench["average"],
        "score_low": mtbench["average_low"],
        "score_high": mtbench["average_high"],
        "first_turn": mtbench["first_turn"],
        "second_turn": mtbench["second_turn"],
    }


DIFFERENCE = [*span("difference"), "standard_error", "wins", "ties", "losses", "p_holm"]


def differences(judged: dict[str, Any], keys: list[str], other: str) -> pd.DataFrame:
    """Each cell minus another model, paired by question, with Holm's correction over the cells; a row a cell, in order.

    `judged` has the content of metrics/mtbench for each model. The other model has no difference from itself.
    """
    theirs = question_scores(judged[other])
    compared = [key for key in keys if key != other]
    if not compared:
        return pd.DataFrame(index=keys, columns=DIFFERENCE, dtype=float)
    found = [paired_difference(question_scores(judged[key]), theirs) for key in compared]
    rows = [
        spanned("difference", difference)
        | {
            "standard_error": difference.standard_error,
            "wins": difference.wins,
            "ties": difference.ties,
            "losses": difference.losses,
            "p_holm": p_holm,
        }
        for difference, p_holm in zip(found, holm([difference.p_value for difference in found]), strict=True)
    ]
    return pd.DataFrame(rows, pd.Index(compared), DIFFERENCE).reindex(keys)


def lengths(answers: list[Any]) -> dict[int, float]:
    """The mean tokens of both replies, by question."""
    return {answer["question_id"]: fmean(answer["choices"][0]["tokens"]) for answer in answers}


def at_equal_length(judged: dict[str, Any], answers: dict[str, list[Any]], keys: list[str]) -> pd.DataFrame:
    """Each cell minus the base at equal length of the replies; empty where every reply differs by the same length."""
    base, theirs = judged["base"]["questions"], lengths(answers["base"])
    rows: list[dict[str, float]] = []
    for key in keys:
        ours = lengths(answers[key])
        scores = [judged[key]["questions"][number] - base[number] for number in base]
        apart = [ours[int(number)] - theirs[int(number)] for number in base]
        if min(apart) == max(apart) != 0:
            rows.append({})
        else:
            rows.append(spanned("equal_length", length_controlled_difference(scores, apart)))
    return pd.DataFrame(rows, keys, span("equal_length"), dtype=float)


def training_table(cells: list[Cell]) -> pd.DataFrame:
    """A row a cell, in the grid's order: what training and merge measured."""
    return pd.DataFrame([training_row(cell) for cell in cells])


def mtbench_table(
    cells: list[Cell], recipe: Cell, judged: dict[str, Any], answers: dict[str, list[Any]]
) -> pd.DataFrame:
    """A row a cell that answered, in the grid's order: the training's columns, scores and paired differences.

    `judged` and `answers` have the content of metrics/mtbench and of the answers, for the base and for each cell.
    """
    keys = [cell.key for cell in cells]
    reference = recipe.key if recipe.key in keys else keys[0]
    to_recipe = differences(judged, keys, reference).drop(columns=["standard_error", "wins", "ties", "losses"])
    answered = pd.DataFrame([answer_row(cell, judged[cell.key]) for cell in cells])
    return (
        training_table(cells)
        .merge(answered, on="cell", validate="one_to_one")
        .join(differences(judged, keys, "base"), on="cell")
        .join(to_recipe.add_prefix("recipe_"), on="cell")
        .join(at_equal_length(judged, answers, keys), on="cell")
    )


def base_row(judged: dict[str, Any]) -> dict[str, Any]:
    """The base's row above the cells': scores, and what its answers are like."""
    answered = read_json(ANSWER_METRICS / "base.json")
    shown = {name: answered[name] for name in ("share_truncated", "mean_tokens", "repetition")}
    return {"cell": "base", **score_columns(judged["base"]), **shown}


QUESTION_SCORES = REPORTS / "questions.csv"


def question_table(questions: list[Any], judged: dict[str, Any]) -> pd.DataFrame:
    """Every model's mean score of each question: a row a question, a column a model; all that a paired test needs."""
    scores = {key: {int(number): score for number, score in judged[key]["questions"].items()} for key in judged}
    return pd.DataFrame(
        {"question": question["number"], "category": question["category"]}
        | {key: scores[key][question["number"]] for key in judged}
        for question in questions
    )


def highest_scoring(cells: pd.DataFrame) -> dict[str, str]:
    """The key of each loss's cell with the highest score, the first of equals."""
    ordered = cells.sort_values("score", ascending=False, kind="stable").drop_duplicates("loss")
    return dict(zip(ordered["loss"], ordered["cell"], strict=True))


def category_scores(cells: pd.DataFrame, judged: dict[str, Any]) -> pd.DataFrame:
    """The base's and each loss's highest-scoring cell's score in every category, the losses in the grid's order."""
    highest = highest_scoring(cells)
    keys = [highest[loss] for loss in dict.fromkeys(cells["loss"])]
    sources = {key: judged[key] for key in ("base", *keys)}
    return pd.DataFrame(
        [
            {"model": name, "category": category, "score": score}
            for name, metrics in sources.items()
            for category, score in metrics["categories"].items()
        ]
    )


def curve_table(cells: list[Cell]) -> pd.DataFrame:
    return pd.concat(
        pd.read_csv(StringIO(read_text(CURVES / f"{cell.key}.csv"))).assign(
            cell=cell.key, loss_name=cell.loss, beta=cell.beta, steps=str(cell.steps)
        )
        for cell in cells
    )


# Column of the table of cells → heading and how a value is printed.
COLUMNS = {
    "cell": ("cell", "{}"),
    **with_interval("score", "score"),
    **with_interval("difference", "minus base", "{:+.2f}"),
    "p_holm": ("p, Holm", "{:.2f}"),
    **with_interval("equal_length", "at equal length", "{:+.2f}"),
    **with_interval("recipe_difference", "minus recipe", "{:+.2f}"),
    "recipe_p_holm": ("p, Holm", "{:.2f}"),
    "wins": ("won", "{:.0f}"),
    "ties": ("tied", "{:.0f}"),
    "losses": ("lost", "{:.0f}"),
    "first_turn": ("first turn", "{:.2f}"),
    "second_turn": ("second turn", "{:.2f}"),
    "accuracy": ("held-out accuracy", "{:.2f}"),
    "shorter_accuracy": ("the shorter is chosen", "{:.2f}"),
    "balanced_accuracy": ("balanced by length", "{:.2f}"),
    "margin_per_token": ("margin a token, nats", "{:.3f}"),
    **with_interval("margin", "held-out margin, nats"),
    **with_interval("loss_change", "held-out loss, minus base", "{:+.3f}"),
    "chosen_shift": ("chosen shift, nats", "{:.2f}"),
    "rejected_shift": ("rejected shift, nats", "{:.2f}"),
    "margin_kept": ("margin kept by merge", "{:.1%}"),
    **with_interval("margin_answering", "margin as it answers, nats"),
    "share_truncated": ("answers truncated", "{:.0%}"),
    "mean_tokens": ("tokens a reply", "{:.0f}"),
    "repetition": ("repeated 4-grams", "{:.0%}"),
}
COST_COLUMNS = {
    "cell": ("cell", "{}"),
    "train_seconds": ("training, s", "{:.0f}"),
    "train_speed": ("training, tokens/s", "{:.0f}"),
    "peak_memory_gib": ("training, peak GiB", "{:.2f}"),
    "evaluate_seconds": ("replies and KL, s", "{:.0f}"),
    "answer_seconds": ("answers, s", "{:.0f}"),
    "answer_speed": ("answers, tokens/s", "{:.0f}"),
    "usd": ("judging, USD", "{:.2f}"),
}


def costs(keys: Sequence[str], judged: dict[str, Any]) -> Table:
    """What each model took; a dash where it was not asked."""
    rows = []
    for key in keys:
        answer = read_json(ANSWER_COST / f"{key}.json") if key in judged else {}
        replies = EVALUATE_COST / f"{key}.json"
        train = read_json(TRAIN_COST / f"{key}.json") if key != "base" else {}
        rows.append(
            {
                "cell": key,
                "train_seconds": train.get("seconds"),
                "train_speed": train.get("tokens_per_second"),
                "peak_memory_gib": train.get("peak_memory_gib"),
                "evaluate_seconds": read_json(replies)["seconds"] if replies.exists() else None,
                "answer_seconds": answer.get("seconds"),
                "answer_speed": answer.get("tokens_per_second"),
                "usd": judged[key]["usd"] if key in judged else None,
            }
        )
    reading = "Of the run that made each file; a cell from DVC's cache has the cost of the machine that computed it."
    return Table("Cost", reading, pd.DataFrame(rows), COST_COLUMNS, measured_here=True)


def left_out(prepared: dict[str, Any]) -> Table:
    rows = [{"reason": reason.replace("_", " "), "pairs": pairs} for reason, pairs in prepared["dropped"].items()]
    reading = f"Of {prepared['rows']} pairs, {prepared['train']} are trained on and {prepared['heldout']} held out."
    return Table(
        "Pairs left out", reading, pd.DataFrame(rows), {"reason": ("reason", "{}"), "pairs": ("pairs", "{:.0f}")}
    )


def judge_check(judge: dict[str, Any]) -> Table:
    columns = {"prompt": ("prompt, questions", "{}"), "bad": ("bad answer", "{}")}
    columns |= with_interval("auc", "ranked below the good one") | with_interval("margin", "margin, points")
    kinds = {"all": "all", "without_reference": "without reference", "with_reference": "with reference"}
    rows = [
        {"prompt": f"{prompt}, {judge[kind]['questions']}", "bad": bad.replace("_", " ")} | judge[kind][bad]
        for kind, prompt in kinds.items()
        if kind in judge
        for bad in ("swapped", "truncated", "padded", "claims_rating")
        if bad in judge[kind]
    ]
    reading = (
        "Good answers are references, or written for this project; the bad ones are another question's (swapped), the "
        "first quarter (truncated), a longer one that says no more (padded), and another question's that claims a "
        f"rating of 10. 0.5 is chance. With {judge['questions']} questions a judge that is right "
        f"{judge['true_auc']:.0%} of the time passes one comparison with probability {judge['all']['power']:.2f}."
    )
    # A judge of pairs gives no margin.
    return Table("Judge check", reading, pd.DataFrame(rows, columns=list(columns)), columns)


def spread(keys: tuple[str, ...], judgements: dict[str, list[Any]]) -> list[Table]:
    """Of a judge that was asked several times: where a question's score varies; no table where it was asked once.

    Seeds and answer samples have one row of scores each in a sweep: prefscan compare sets seeds apart.
    """
    rows = []
    for key in keys:
        scores: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for judgement in judgements[key]:
            scores[judgement["sample"]][judgement["question_id"]].append(judgement["score"])
        if not scores:  # the model that pairs are judged against
            continue
        if len(scores) < 2:
            return []
        matrix = [
            [fmean(turns) for _, turns in sorted(by_question.items())] for _, by_question in sorted(scores.items())
        ]
        parts = variance_components(np.array(matrix).T[:, None, None, :])
        assert parts.judge is not None  # of two or more samples
        rows.append({"cell": key, "question": parts.question**0.5, "judge": parts.judge**0.5})
    reading = (
        "Standard deviations in points, of a question's score (both turns together): between questions, which more "
        "questions average away, and between judgements of the same answers, which `judge.samples` does."
    )
    columns = {"cell": ("cell", "{}"), "question": ("questions", "{:.2f}"), "judge": ("judgements", "{:.2f}")}
    return [Table("Spread", reading, pd.DataFrame(rows), columns)]


def category_differences(table: pd.DataFrame, judged: dict[str, Any]) -> pd.DataFrame:
    """Each cell's score in each category minus the base's; a row a cell and category."""
    base = judged["base"]["categories"]
    return pd.DataFrame(
        {"loss": row["loss"], "beta": row["beta"], "steps": row["steps"], "category": category}
        | {"difference": score - base[category]}
        for row in table.to_dict("records")
        for category, score in judged[row["cell"]]["categories"].items()
    )
