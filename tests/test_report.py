"""The report stage on a small sweep: what it writes says what the metrics say, and runs nothing that a name holds."""

import contextlib
import csv
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from scipy import stats

from mtbench_data import (
    CATEGORIES,
    ROOT,
    local_judge,
    make_questions,
    openai_judge,
    shown_by_fastchat,
    write_lines,
    write_params,
)
from prefscan import report
from prefscan.errors import UserError
from prefscan.files import write_json, write_text
from prefscan.mtbench import scores

LOSSES, BETAS = ("sigmoid", "ipo"), (0.1, 0.5)
CELLS = [f"{loss}-{beta}-8" for loss in LOSSES for beta in BETAS]
# Ratings before the question's own: ipo-0.1-8 and sigmoid-0.5-8 are the highest of their losses.
LEVELS = {"base": 4.0, "sigmoid-0.1-8": 3.0, "sigmoid-0.5-8": 6.5, "ipo-0.1-8": 4.5, "ipo-0.5-8": 2.0}
CHARTS = (
    *("score", "differences", "divergence", "categories", "heat", "length"),
    *("accuracy", "margin", "curves"),
)
CATEGORY_OF = {q["question_id"]: q["category"] for q in make_questions(1)}


def mtbench_metrics(judgements: list[dict[str, Any]], categories: dict[int, str]) -> dict[str, Any]:
    return scores(judgements, categories) | {"judge": "tiny", "references": "corrected", "usd": 0.25}


def divergence_of(i: int) -> dict[str, float]:
    return {"per_reply": i / 2, "per_reply_low": i / 2 - 1, "per_reply_high": i / 2 + 1, "per_token": i / 100}


def write_sweep(root: Path, categories: dict[int, str] = CATEGORY_OF, words: str = "well", **params: Any) -> None:
    """params.yaml and the metrics of four cells, as the stages before report leave them in a workspace."""
    grid = {"loss": [LOSSES[0], *LOSSES], "beta": [BETAS[0], *BETAS], "steps": [8]}
    recipe = {"loss": "sigmoid", "beta": 0.5, "steps": 8}
    write_params(root, **({"grid": grid, "judge": local_judge("models/base")} | recipe | params))
    asked = [question | {"category": categories[question["question_id"]]} for question in make_questions(1)]
    write_lines(root / "data/questions/question.jsonl", asked)
    for i, (key, level) in enumerate(LEVELS.items()):
        judgements = [
            {
                "question_id": question,
                "model": key,
                "score": level + question % 3 / 2 + turn / 8 + question * i % 5 / 2,
                "turn": turn,
                "judgment": f"Of {key}: {words}",
            }
            for question in CATEGORY_OF
            for turn in (1, 2)
        ]
        write_lines(root / f"data/mt_bench/model_judgment/cells/{key}.jsonl", judgements)
        answers = [
            {
                "question_id": question,
                "choices": [
                    {"turns": [f"{key} {words}", "again"], "tokens": [9 + question % 4 * i, 9], "cut": [False] * 2}
                ],
            }
            for question in CATEGORY_OF
        ]
        write_lines(root / f"data/mt_bench/model_answer/{key}.jsonl", answers)
        write_json(root / f"metrics/cost/answer/{key}.json", {"seconds": 20.0 + i, "tokens_per_second": 70.0})
        write_json(root / f"metrics/mtbench/{key}.json", mtbench_metrics(judgements, categories))
        write_json(
            root / f"metrics/answer/{key}.json",
            {"questions": 8, "mean_tokens": 50.0 + i, "share_cut": i / 16, "repetition": i / 8}
            | ({} if key == "base" else {"divergence": divergence_of(i)}),
        )
        if key == "base":
            continue
        heldout = {
            **{"accuracy": 0.5 + i / 20, "accuracy_low": 0.4 + i / 20, "accuracy_high": 0.6 + i / 20},
            **{"margin": 2.0 * i - 1, "margin_low": 2.0 * i - 2, "margin_high": 2.0 * i},
            **{"chosen_shift": -0.25 * i, "rejected_shift": -0.75 * i},
        }
        cost = {"seconds": 10.0 + i, "tokens_per_second": 100.0, "peak_memory_gib": 1.5}
        write_json(root / f"metrics/train/{key}.json", {"loss": 0.5, "heldout": heldout})
        write_json(root / f"metrics/cost/train/{key}.json", cost)
        kept = None if key == "ipo-0.5-8" else 1 - i / 100  # None: the adapter had no margin to keep
        write_json(root / f"metrics/merge/{key}.json", {"margin_kept": kept, "weights_changed": 0.9})
        curve = "".join(f"{step},{0.7 - step / 100},{step / 50},0.5,1.0,0.001\n" for step in range(1, 9))
        header = "step,loss,reward_margin,reward_accuracy,grad_norm,learning_rate\n"
        write_text(root / f"metrics/curves/{key}.csv", header + curve)
    write_json(root / "metrics/judge.json", judge_metrics())
    write_json(root / "metrics/prepare.json", {"rows": 300, "train": 31, "heldout": 30})


def judge_metrics(swapped_low: float = 0.44, truncated_low: float = 0.4) -> dict[str, Any]:
    """The part of metrics/judge.json that the report reads."""
    found = {
        "swapped": {"auc": 0.53, "auc_low": swapped_low, "auc_high": 0.61},
        "truncated": {"auc": 0.56, "auc_low": truncated_low, "auc_high": 0.72},
    }
    return {"judge": "tiny", "questions": 15, "without_reference": found}


def metrics(kind: str, key: str) -> Any:
    return json.loads(Path(f"metrics/{kind}/{key}.json").read_text())


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small sweep and its report."""
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root)
    with contextlib.chdir(root):
        report.main()
    return root


@pytest.fixture
def sweep(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small sweep and its report as the working directory; do not write to it."""
    monkeypatch.chdir(reported)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, for tests that do not look at them."""
    monkeypatch.setattr(alt.TopLevelMixin, "save", lambda _, path, **__: Path(path).write_text("<svg></svg>"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_stage_writes_its_files(in_tmp: Path, reported: Path) -> None:
    """As `dvc repro` runs it; and a second run, in another process and folder, writes the same bytes."""
    write_sweep(in_tmp)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prefscan.report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = {f"{chart}.{form}" for chart in CHARTS for form in ("svg", "png")}
    pages = {"report.html", "answers.html", "report.md"}
    assert {path.name for path in Path("reports").iterdir()} == pages | {"cells.csv", "charts"}
    assert {path.name for path in Path("reports/charts").iterdir()} == pictures
    assert Path("metrics/summary.json").exists()
    assert Path("data/mt_bench/model_judgment/tiny_single.jsonl").exists()
    assert contents(in_tmp) == contents(reported)


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG by type, each checked against its CRC, those of one type joined."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found: dict[bytes, bytes] = {}
    place = 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0]
        found[kind] = found.get(kind, b"") + body
        place += 12 + length
    return found


@pytest.mark.usefixtures("sweep")
def test_pictures_are_whole_and_not_blank() -> None:
    for path in Path("reports/charts").glob("*.png"):
        found = chunks(path.read_bytes())
        width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", found[b"IHDR"])
        assert (depth, colour) == (8, 6)  # RGBA, one byte a channel
        assert width > 500
        assert height > 300
        pixels, row = zlib.decompress(found[b"IDAT"]), 1 + 4 * width
        assert len(pixels) == height * row
        # A blank picture has two different rows, after the filter that the first byte of a row names.
        assert len({pixels[i : i + row] for i in range(0, len(pixels), row)}) > 50
        assert b"IEND" in found


@pytest.mark.usefixtures("sweep")
def test_the_table_holds_the_metrics() -> None:
    with Path("reports/cells.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base", *CELLS]
    for key, row in rows.items():
        judged = metrics("mtbench", key)
        expected = {
            **{"score": judged["average"], "score_low": judged["average_low"], "score_high": judged["average_high"]},
            **{name: judged[name] for name in ("first_turn", "second_turn")},
            **{name: metrics("answer", key)[name] for name in ("share_cut", "mean_tokens", "repetition")},
        }
        if key == "base":
            expected |= {"accuracy": 0.5, "margin": 0, "chosen_shift": 0, "rejected_shift": 0}
            assert row["margin_kept"] == row["beta"] == row["divergence"] == ""
        else:
            trained, merged = metrics("train", key), metrics("merge", key)
            expected |= trained["heldout"] | {"train_seconds": metrics("cost/train", key)["seconds"]}
            expected |= {"beta": float(key.split("-")[1]), "steps": 8, "peak_memory_gib": 1.5}
            ratio = metrics("answer", key)["divergence"]
            expected |= {f"divergence{end}": ratio[f"per_reply{end}"] for end in ("", "_low", "_high")}
            assert row["loss"] == key.split("-")[0]
            assert row["margin_kept"] == ("" if merged["margin_kept"] is None else str(merged["margin_kept"]))
        assert {name: float(row[name]) for name in expected} == expected


def expected_row(key: str) -> list[str]:
    """A row of the printed table, from the metrics."""
    judged, answered = metrics("mtbench", key), metrics("answer", key)
    text = [f"{answered['share_cut']:.0%}", f"{answered['mean_tokens']:.0f}", f"{answered['repetition']:.0%}"]
    printed = [judged[name] for name in ("average", "average_low", "average_high", "first_turn", "second_turn")]
    if key == "base":
        rest = ["0.50", "0.00", "–", "–", "0.00", "0.00", "–", *text, "–", "–", "–", "–"]
    else:
        held, kept = metrics("train", key)["heldout"], metrics("merge", key)["margin_kept"]
        names = ("accuracy", "margin", "margin_low", "margin_high", "chosen_shift", "rejected_shift")
        seconds = f"{metrics('cost/train', key)['seconds']:.0f}"
        ratio = [f"{answered['divergence'][name]:.2f}" for name in ("per_reply", "per_reply_low", "per_reply_high")]
        merged = "–" if kept is None else f"{kept:.1%}"
        rest = [*(f"{held[name]:.2f}" for name in names), merged, *text, *ratio, seconds]
    differs = ["–"] * 7 if key == "base" else expected_differences()[key]
    scores = [f"{value:.2f}" for value in printed]
    return [key, *scores[:3], *differs, *scores[3:], *rest]


def by_question(key: str) -> list[float]:
    return [value for _, value in sorted(metrics("mtbench", key)["questions"].items())]


def expected_differences() -> dict[str, list[str]]:
    """The printed comparison with the base by scipy's paired t test, and Holm's correction as its definition has it."""
    base = by_question("base")
    tests = {key: stats.ttest_rel(by_question(key), base) for key in CELLS}
    ordered = sorted(CELLS, key=lambda key: tests[key].pvalue)
    corrected, largest = {}, 0.0
    for place, key in enumerate(ordered):
        largest = max(largest, (len(CELLS) - place) * tests[key].pvalue)
        corrected[key] = min(largest, 1.0)
    found = {}
    for key in CELLS:
        interval = tests[key].confidence_interval()
        apart = [a - b for a, b in zip(by_question(key), base, strict=True)]
        counts = [sum(d > 0 for d in apart), sum(d == 0 for d in apart), sum(d < 0 for d in apart)]
        numbers = (sum(apart) / len(apart), interval.low, interval.high)
        found[key] = [*(f"{n:+.2f}" for n in numbers), f"{corrected[key]:.2f}", *map(str, counts)]
    return found


class Page(HTMLParser):
    """The tags, attributes, table and lead paragraphs of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.leads: list[str] = []
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag == "p":
            self.leads.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] in (["td"], ["th"]) and data.strip():
            self.rows[-1].append(data)
        elif self.tags[-1:] == ["p"]:
            self.leads[-1] += data
        elif self.tags[-1:] == ["h1"]:
            self.title += data


@pytest.mark.usefixtures("sweep")
def test_the_page_and_the_markdown_print_the_table() -> None:
    page = Page(Path("reports/report.html").read_text())
    wanted = [expected_row(key) for key in ("base", *CELLS)]
    assert page.rows[1:] == wanted
    assert len(page.rows[0]) == len(wanted[0])
    lines = Path("reports/report.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == page.rows[0]
    assert set(table[1]) == {"---"}
    assert table[2:] == wanted
    for name in ("score", "categories", "accuracy", "margin", "curves"):
        assert any(line.startswith("![") and line.endswith(f"]({name}.png)") for line in lines)
    leads = [lead.strip() for lead in page.leads if lead.strip()]
    assert [line for line in lines if line in leads] == leads
    assert len(leads) == 8


@pytest.mark.usefixtures("sweep")
def test_the_summary_leads_with_the_recipe() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads(Path("metrics/summary.json").read_text(), parse_constant=refuse)
    assert list(summary) == ["recipe", "base", "highest"]
    assert summary["recipe"]["cell"] == "sigmoid-0.5-8"
    assert {loss: entry["cell"] for loss, entry in summary["highest"].items()} == {
        "ipo": "ipo-0.1-8",
        "sigmoid": "sigmoid-0.5-8",
    }
    for entry in (summary["recipe"], *summary["highest"].values()):
        judged, held = metrics("mtbench", entry["cell"]), metrics("train", entry["cell"])["heldout"]
        expected = {
            **{"score": judged["average"], "score_low": judged["average_low"], "score_high": judged["average_high"]},
            **{name: judged[name] for name in ("first_turn", "second_turn")},
            **{name: held[name] for name in ("accuracy", "margin", "margin_low", "margin_high")},
            "margin_kept": metrics("merge", entry["cell"])["margin_kept"],
        }
        assert {name: value for name, value in entry.items() if name != "cell"} == pytest.approx(expected, abs=1e-6)
    assert summary["base"]["score"] == pytest.approx(metrics("mtbench", "base")["average"], abs=1e-6)
    assert (summary["base"]["accuracy"], summary["base"]["margin"]) == (0.5, 0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("losses", "kept"), [(["ipo"], "no held-out margin"), (["sigmoid", "ipo"], "98.0% to 98.0% of the held-out margin")]
)
def test_a_margin_that_could_not_be_kept_is_null(in_tmp: Path, losses: list[str], kept: str) -> None:
    """In one of two cells, and in the one cell that there is."""
    write_sweep(in_tmp, grid={"loss": losses, "beta": [0.5], "steps": [8]}, loss="ipo", beta=0.5)
    report.main()
    summary = json.loads(Path("metrics/summary.json").read_text())
    assert summary["recipe"]["cell"] == "ipo-0.5-8"
    assert summary["recipe"]["margin_kept"] is None
    assert {*summary["highest"]} == {*losses}
    assert f"The merges, in fp32, kept {kept}; " in leads()[-1]
    assert {path.stem for path in Path("metrics/train").iterdir()} == {f"{loss}-0.5-8" for loss in losses}


def leads() -> list[str]:
    return [lead.strip() for lead in Page(Path("reports/report.html").read_text()).leads]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("swapped_low", "truncated_low", "verdict"),
    [
        (0.44, 0.4, "it cannot be shown to tell them apart, so no score below should be read as quality."),
        (0.5, 0.5, "it cannot be shown to tell them apart, so no score below should be read as quality."),
        (0.44, 0.51, "it can tell it from its own first quarter only, so no score below should be read as quality."),
        (0.51, 0.4, "it can tell it from the same answer given to another question only, so no score below should be"),
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
        "The judge tiny ranks a reference answer above the same answer given to another question with probability "
        f"0.53 [{swapped_low:.2f}, 0.61], and above its own first quarter with probability "
        f"0.56 [{truncated_low:.2f}, 0.72] (95 % intervals over 15 questions; 0.5 is chance): {verdict}"
    )
    paragraphs = Path("reports/report.md").read_text().split("\n\n")
    assert paragraphs[1].strip() == first


@pytest.mark.usefixtures("sweep")
def test_a_local_judge_is_named_as_no_judge_of_quality() -> None:
    first = leads()[1]
    assert first.startswith("The scores come from the small local judge tiny: they show that the pipeline works,")
    assert first.endswith("not which method is better.")


@pytest.mark.usefixtures("quick")
def test_a_server_judge_needs_no_such_warning(in_tmp: Path) -> None:
    write_sweep(in_tmp, judge=openai_judge("http://127.0.0.1:9/v1"))
    report.main()
    assert leads()[1].startswith("4 cells of ")
    assert "local judge" not in Path("reports/report.html").read_text() + Path("reports/report.md").read_text()


@pytest.mark.usefixtures("sweep")
def test_the_sentences_say_what_the_metrics_say() -> None:
    _, _, compared, scored, differ, picked, held, merged = leads()
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
    assert "sigmoid " in picked
    assert f"for {max(averages[:2]):.2f} (sigmoid-0.5-8)" in picked
    assert f"for {max(averages[2:]):.2f} (ipo-0.1-8)" in picked
    assert "accuracy is 0.55 to 0.70 beside the base's 0.5, over all 30 held-out pairs" in held
    assert "above zero beyond its 95 % interval in 3 of 4 cells." in held  # margin_low is 0, 2, 4 and 6
    assert "The merges, in fp32, kept 97.0% to 99.0% of the held-out margin; 6% to 25% of the answers" in merged


@pytest.mark.usefixtures("quick")
def test_cells_outside_the_grid_are_neither_read_nor_left(in_tmp: Path) -> None:
    write_sweep(in_tmp)
    report.main()
    first = Path("reports/cells.csv").read_bytes()
    stale = [
        *(Path(f"metrics/{kind}/sigmoid-0.9-8.json") for kind in ("train", "merge", "answer", "mtbench")),
        Path("metrics/curves/sigmoid-0.9-8.csv"),
        Path("data/mt_bench/model_judgment/cells/sigmoid-0.9-8.jsonl"),
    ]
    for path in stale:
        path.write_text("neither JSON nor CSV")
    report.main()
    assert Path("reports/cells.csv").read_bytes() == first
    assert not [path for path in stale if path.exists()]
    assert "0.9" not in Path("data/mt_bench/model_judgment/tiny_single.jsonl").read_text()
    assert len(list(Path("metrics/train").iterdir())) == 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "lost",
    [
        "metrics/prepare.json",
        "metrics/answer/base.json",
        "metrics/mtbench/base.json",
        "data/mt_bench/model_judgment/cells/base.jsonl",
        *(f"metrics/{kind}/ipo-0.5-8.json" for kind in ("train", "merge", "answer", "mtbench")),
        "metrics/curves/ipo-0.5-8.csv",
        "data/mt_bench/model_judgment/cells/ipo-0.5-8.jsonl",
    ],
)
def test_a_missing_file_ends_with_a_sentence(in_tmp: Path, lost: str) -> None:
    write_sweep(in_tmp)
    Path(lost).unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(lost)} is missing; run `dvc repro` to make it"):
        report.main()
    assert not Path("metrics/summary.json").exists()
    assert not Path("reports").exists()


@pytest.mark.usefixtures("sweep")
def test_show_result_reads_the_combined_judgements() -> None:
    shown = shown_by_fastchat("--judge-model", "tiny")
    for key in ("base", *CELLS):
        for name, section in zip(("first_turn", "second_turn", "average"), shown, strict=True):
            digits = len(section[key].split(".")[1])
            assert f"{metrics('mtbench', key)[name]:.{digits}f}" == section[key]
    assert [set(section) for section in shown] == [{"base", *CELLS}] * 3


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' & {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def hostile_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a sweep whose model, data set and categories have hostile names."""
    root = tmp_path_factory.mktemp("hostile")
    categories = {question: HOSTILE + category for question, category in CATEGORY_OF.items()}
    params = {name: {"name": HOSTILE} for name in ("model", "data")}
    write_sweep(root, categories, **params)
    with contextlib.chdir(root):
        report.main()
    return root / "reports"


@pytest.fixture
def hostile(hostile_reports: Path) -> str:
    return (hostile_reports / "report.html").read_text()


def test_hostile_names_are_text(hostile: str) -> None:
    page = Page(hostile)
    assert {"script", "img", "iframe", "object", "embed", "link", "base", "form"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.title == f"{HOSTILE}: 4 cells"
    assert f"4 cells of {HOSTILE} on {HOSTILE}: losses" in page.leads[2]
    assert hostile.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3 + len(CATEGORIES)  # categories label the chart
    assert "49" not in page.title + page.leads[2]


def test_hostile_names_are_text_in_the_markdown_too(hostile_reports: Path) -> None:
    text = (hostile_reports / "report.md").read_text()
    assert text.startswith("# &lt;script>alert(1)&lt;/script>&lt;img src=x onerror=alert(2)>")
    assert "<" not in text


def test_the_page_loads_and_runs_nothing(hostile: str) -> None:
    page = Page(hostile)
    loading = ("src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "formaction", "ping")
    assert not [value for name, value in page.attributes if name in loading]
    assert not [url for url in re.findall(r"url\(([^)]*)\)", hostile) if not url.strip("\"'").startswith("#")]
    assert "@import" not in hostile
    assert not [v for n, v in page.attributes if not n.startswith("xmlns") and v and re.match(r"\s*(https?:)?//", v)]
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@pytest.mark.usefixtures("sweep")
def test_pages_hold_all_charts() -> None:
    page = Page(Path("reports/report.html").read_text())
    assert page.tags.count("svg") == 5
    assert page.tags.count("figure") == 5


@pytest.mark.usefixtures("quick")
def test_the_first_of_equals_is_highest(in_tmp: Path) -> None:
    write_sweep(in_tmp)
    Path("metrics/mtbench/sigmoid-0.1-8.json").write_text(Path("metrics/mtbench/sigmoid-0.5-8.json").read_text())
    report.main()
    highest = json.loads(Path("metrics/summary.json").read_text())["highest"]
    assert highest["sigmoid"]["cell"] == "sigmoid-0.1-8"
