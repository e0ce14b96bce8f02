"""The first lines of the report say what the metrics say, and no more."""

import csv
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mtbench_data import openai_judge
from prefscan.common.io import read_json, write_json
from prefscan.reporting.findings import difference_sentences
from prefscan.reporting.stats import selected_best
from prefscan.stages import report
from sweep_data import CELLS, caveats, expected_differences, judge_metrics, leads, metrics, write_sweep


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("swapped_low", "truncated_low", "verdict"),
    [
        (0.44, 0.4, "it cannot be shown to tell them apart, so no score below should be read as quality."),
        (0.5, 0.5, "it cannot be shown to tell them apart, so no score below should be read as quality."),
        (0.44, 0.51, "it can tell it from its own first quarter only, so no score below should be read as quality."),
        (0.51, 0.4, "it can tell it from another question's only, so no score below should be read as quality."),
        (0.51, 0.51, "it can tell them apart."),
    ],
)
def test_the_first_sentence_says_whether_the_judge_can_tell(
    in_tmp: Path, swapped_low: float, truncated_low: float, verdict: str
) -> None:
    write_sweep(in_tmp)
    write_json(in_tmp / "metrics/judge.json", judge_metrics(swapped_low, truncated_low))
    report.main()
    first = leads()[0]
    assert first.startswith(
        "The judge tiny ranks a good answer above a bad one with probability: another question's "
        f"0.53 [{swapped_low:.2f}, 0.61], its own first quarter 0.56 [{truncated_low:.2f}, 0.72] (95 % intervals over "
        "15 questions; 0.5 is chance, and a judge that is right 80% of the time would pass each with probability "
        f"0.65): {verdict}"
    )
    paragraphs = Path("reports/report.md").read_text().split("\n\n")
    assert paragraphs[1].strip() == first


@pytest.mark.usefixtures("sweep")
def test_a_local_judge_is_named_as_no_judge_of_quality() -> None:
    first = leads()[1]
    assert first == (
        "The scores come from a judge on this machine, tiny (the base model SmolLM2-135M-Instruct itself): they show "
        "that the pipeline works, not which method is better."
    )


@pytest.mark.usefixtures("quick")
def test_a_server_judge_needs_no_such_warning(in_tmp: Path) -> None:
    write_sweep(in_tmp, judge=openai_judge("http://127.0.0.1:9/v1"))
    report.main()
    assert leads()[1].startswith("4 cells of ")
    assert (
        "judge on this machine" not in Path("reports/report.html").read_text() + Path("reports/report.md").read_text()
    )


@pytest.mark.usefixtures("quick")
def test_a_single_cell_is_spoken_of_as_one(in_tmp: Path) -> None:
    write_sweep(in_tmp, grid={"loss": ["sigmoid"], "beta": [0.5], "steps": [8]})
    report.main()
    assert Path("reports/report.md").read_text().startswith("# SmolLM2-135M-Instruct: 1 cell\n")
    said = " ".join([*leads(), *caveats()])
    for part in (
        "1 cell of SmolLM2-135M-Instruct on ",
        re.compile(r"the cell \d\.\d\d: MT-Bench score"),
        re.compile(r"the cell lies [-+]\d\.\d\d from the base; with Holm's correction over 1 cell "),
        re.compile(r"for sigmoid in [01] of 1\."),
        "kept 98.0% of the held-out margin",
    ):
        assert re.search(part if isinstance(part, re.Pattern) else re.escape(part), said), part


@pytest.mark.usefixtures("quick")
def test_scores_that_do_not_differ_are_no_finding(in_tmp: Path) -> None:
    """As where a judge of pairs always names the first answer: every turn is a tie."""
    write_sweep(in_tmp)
    base = metrics("mtbench", "base")
    for key in CELLS:
        write_json(in_tmp / f"metrics/mtbench/{key}.json", metrics("mtbench", key) | {"questions": base["questions"]})
    report.main()
    said = " ".join(caveats())
    assert "with Holm's correction over 4 cells none differs significantly (smallest corrected p 1.00)" in said
    assert "nan" not in said


def test_a_pick_is_shown_with_its_score_corrected_for_the_picking() -> None:
    scores = {"base": [4.0] * 8, "a": [5, 3, 6, 4, 5, 2, 6, 5], "b": [3, 6, 4, 5, 4, 5, 3, 5.5]}
    judged = {key: {"questions": {str(81 + i): score for i, score in enumerate(s)}} for key, s in scores.items()}
    cells = pd.DataFrame({"cell": ["a", "b"], "loss": "ipo", "difference": 0.4, "standard_error": 0.4, "p_holm": 0.5})
    _, picked = difference_sentences(cells, judged)
    best = selected_best([scores["a"], scores["b"]])
    assert best.low < best.corrected < best.apparent - 0.05 < best.apparent == 4.5
    assert picked.endswith(f": ipo {best.corrected:.2f} [{best.low:.2f}, {best.high:.2f}] for 4.50 (a).")


@pytest.mark.usefixtures("sweep")
def test_the_sentences_say_what_the_metrics_say() -> None:
    _, _, compared = leads()
    scored, differ, picked, held, minimised, merged = caveats()
    assert "losses sigmoid, ipo; β 0.1, 0.5; steps 8." in compared
    assert "31 training and 30 held-out pairs of 300; 8 MT-Bench questions, two turns each." in compared
    base, cells = metrics("mtbench", "base"), [metrics("mtbench", key) for key in CELLS]
    averages = [cell["average"] for cell in cells]
    assert (
        f"The base scores {base['average']:.2f} [{base['average_low']:.2f}, {base['average_high']:.2f}], "
        f"the cells {min(averages):.2f} to {max(averages):.2f}: MT-Bench score (1 to 10);"
    ) in scored
    rows = expected_differences()
    significant = [key for key, row in rows.items() if float(row[3]) <= 0.05]
    assert 0 < len(significant) < 4
    assert f"Holm's correction over 4 cells {', '.join(significant)} differ significantly" in differ
    assert f"smallest corrected p {min(float(row[3]) for row in rows.values()):.2f})" in differ
    with open("reports/cells.csv") as file:
        spreads = list(csv.DictReader(file))[1:]
    differences = [float(row["difference"]) for row in spreads]
    assert f"the cells lie {min(differences):+.2f} to {max(differences):+.2f} from the base" in differ
    assert "sigmoid " in picked
    assert f"for {max(averages[:2]):.2f} (sigmoid-0.5-8)" in picked
    assert f"for {max(averages[2:]):.2f} (ipo-0.1-8)" in picked
    assert "accuracy is 0.55 to 0.70 over 30 pairs" in held
    assert "the rule that the shorter response is the chosen one has 0.38" in held  # 0.375
    # loss_change_high is 0.05, -0.05, -0.15 and -0.25
    assert minimised.endswith("before any correction, for sigmoid in 1 of 2, ipo in 2 of 2.")
    kept = "kept 97.0% to 99.0% of the held-out margin, computed in fp32 over the first 4 of these pairs"
    assert f"The merges, in fp32, {kept}; 6% to 25% of the answers" in merged


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changes", "model", "way_out"),
    [
        ({"merge": {"format": "adapter"}, "answer": {"dtype": "bf16"}}, "the base with the adapter in bf16", ""),
        (
            {"answer": {"dtype": "fp16"}},
            "the merged model in fp16",
            " With merge.format: adapter the adapter keeps its own precision.",
        ),
    ],
)
def test_the_margin_of_a_model_that_answers_otherwise_than_merged_is_said(
    in_tmp: Path, changes: dict[str, Any], model: str, way_out: str
) -> None:
    """Of four cells, the one whose interval ends at zero is not above it."""
    write_sweep(in_tmp, **changes)
    for i, path in enumerate(sorted(Path("metrics/merge").iterdir())):
        measured = {"margin_answering": 1.5 + i, "margin_answering_low": float(i), "margin_answering_high": 3.0 + i}
        write_json(path, read_json(path) | measured)
    report.main()
    assert caveats()[-1] == (
        f"The answers come from {model}, whose held-out margin against the base in that precision is 1.50 to 4.50 nats "
        "where training ended with 1.00 to 7.00: above zero beyond its 95 % interval, before any correction, in 3 of 4 "
        f"cells.{way_out}"
    )
    with open("reports/cells.csv") as file:
        cells = {row["cell"]: row for row in csv.DictReader(file)}
    first = [float(cells["ipo-0.1-8"][f"margin_answering{end}"]) for end in ("", "_low", "_high")]
    assert first == [1.5, 0, 3]
