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
from itertools import pairwise
from pathlib import Path

import pytest
import vl_convert

from mtbench_data import ROOT, local_judge, shown_by_fastchat
from prefscan.common.errors import UserError
from prefscan.reporting.stats import LengthControlledDifference, length_controlled_difference
from prefscan.stages import report
from reward_data import PROMPTS, REPLIES, write_evaluation
from sweep_data import CATEGORY_OF, CELLS, Page, caveats, expected_differences, in_git, metrics, write_sweep

CHARTS = (
    *("score", "differences", "categories", "heat", "length"),
    *("accuracy", "margin", "curves"),
)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_stage_writes_its_files(in_tmp: Path, reported: Path) -> None:
    """As `dvc repro` runs it; and a second run, in another process and folder, writes the same bytes."""
    write_sweep(in_tmp)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prefscan", "report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = {f"{chart}.{form}" for chart in CHARTS for form in ("svg", "png")}
    pages = {"report.html", "answers.html", "report.md"}
    tables = {f"{name}.csv" for name in ("cells", "curves", "prompts", "questions", "recipe-curve")}
    assert {path.name for path in Path("reports").iterdir()} == pages | tables | {"charts"}
    assert {path.name for path in Path("reports/charts").iterdir()} == pictures
    assert Path("metrics/summary.json").exists()
    assert Path("data/mt_bench/model_judgment/tiny_single.jsonl").exists()
    assert contents(in_tmp) == contents(reported)


@pytest.mark.usefixtures("quick")
def test_a_sweep_judged_in_pairs_is_reported(in_tmp: Path) -> None:
    write_sweep(in_tmp, judge=local_judge("models/base") | {"mode": "pair"})
    check = json.loads(Path("metrics/judge.json").read_text())
    for bad in ("swapped", "truncated"):
        for name in ("margin", "margin_low", "margin_high"):
            del check["all"][bad][name]  # as judging.check has it of pairs
    Path("metrics/judge.json").write_text(json.dumps(check))
    for path in Path("data/mt_bench/model_judgment/cells").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            words = row.pop("judgment")
            row |= {"g1_winner": "tie", "g2_winner": "tie", "g1_judgment": words, "g2_judgment": words}
        # The model that the others are judged against has no judgements.
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if path.stem != "base"))
    report.main()
    assert "| all, 15 | swapped | 0.53 | 0.44 | 0.61 | – | – | – |" in Path("reports/report.md").read_text()
    page = Path("reports/answers.html").read_text()
    assert "[in the other order]" in page
    models = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["models"]
    for key in ("base", CELLS[0]):
        for reply in models[key].values():
            assert [judgement["turn"] for judgement in reply["judgements"]] == [1, 2]
    assert {judgement["score"] for reply in models["base"].values() for judgement in reply["judgements"]} == {0.5}
    assert Path("data/mt_bench/model_judgment/tiny_pair.jsonl").exists()


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the small sweep with a known reward, beside MT-Bench of one cell."""
    root = tmp_path_factory.mktemp("rewarded")
    write_evaluation(root, stages={"mtbench": {"loss": ["sigmoid"], "beta": [0.5], "steps": [8]}})
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as quick:
        quick.setattr(vl_convert, "vegalite_to_svg", lambda *_, **__: "<svg></svg>")
        quick.setattr(vl_convert, "vegalite_to_png", lambda *_, **__: b"")
        report.main()
    return root


def test_a_known_reward_leads_its_page(rewarded: Path) -> None:
    """The answer, one chart, the tables that answer, what they cannot say; the rest is folded away."""
    text = (rewarded / "reports/report.html").read_text()
    page = Page(text)
    assert len(page.leads) == 3
    assert "P(positive)" in page.leads[0]
    figures = re.findall(r'<figure id="(\w+)"', text)
    assert figures == ["reward", "gain", "kl", *CHARTS]
    main, details = text.partition("</main>")[0].split('<details class="part">')
    assert re.findall(r'<figure id="(\w+)"', main) == ["reward"]
    captions = re.findall(r"<h2>([^<]+)</h2>", main)
    assert captions == ["The losses", "Loss against loss", "What this cannot say"]
    assert re.findall(r"<h2>([^<]+)</h2>", details) == [
        *("Cells", "What is possible", "MT-Bench", "Judge check", "Training", "Cost", "Pairs left out")
    ]
    assert any(line.startswith("MT-Bench: ") for line in page.caveats)
    assert not any("MT-Bench" in line for line in page.leads)


def test_a_known_rewards_summary_is_of_gains(rewarded: Path) -> None:
    summary = json.loads((rewarded / "metrics/summary.json").read_text())
    measured = {key: json.loads((rewarded / f"metrics/evaluate/{key}.json").read_text()) for key in CELLS}
    assert summary["recipe"]["cell"] == "sigmoid-0.5-8"
    assert {loss: entry["cell"] for loss, entry in summary["highest"].items()} == {
        "sigmoid": "sigmoid-0.1-8",
        "ipo": "ipo-0.1-8",
    }
    for entry in (summary["recipe"], *summary["highest"].values()):
        for name in ("reward", "gain", "kl", "win_rate"):
            assert entry[name] == in_git(measured[entry["cell"]][name])
        assert ("score" in entry) == (entry["cell"] == "sigmoid-0.5-8")  # who answered MT-Bench


def test_every_reply_with_its_reward_can_be_read_and_no_markup_in_it_runs(rewarded: Path) -> None:
    for name in ("report.html", "answers.html"):
        assert "<b>to</b>" not in (rewarded / "reports" / name).read_text()
    page = (rewarded / "reports/answers.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["questions"]) == PROMPTS + len(CATEGORY_OF)
    rows = [json.loads(line) for line in (rewarded / f"data/replies/{CELLS[0]}.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows, start=1):
        shown = data["models"][CELLS[0]][f"prompt {i}"]
        assert shown["turns"] == [reply["text"] for reply in row["replies"]]
        assert "<b>to</b>" in shown["turns"][0]
        scores = [judgement["score"] for judgement in shown["judgements"]]
        assert scores == [round(reply["score"], 4) for reply in row["replies"]]
    assert set(data["models"]["sigmoid-0.5-8"]) > set(data["models"][CELLS[0]])  # with MT-Bench's
    assert {len(reply["turns"]) for reply in data["models"]["base"].values()} == {REPLIES}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "lost",
    [
        "data/samples/eval.jsonl",
        "data/replies/ipo-0.5-8.jsonl",
        "metrics/evaluate/ipo-0.5-8.json",
        "metrics/reward.json",
    ],
)
def test_a_missing_file_of_a_known_reward_ends_with_a_sentence(in_tmp: Path, lost: str) -> None:
    write_evaluation(in_tmp)
    Path(lost).unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(lost)} is missing; run `dvc repro` to make it"):
        report.main()
    assert not Path("reports").exists()


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
        assert height > 200
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
            **{name: metrics("answer", key)[name] for name in ("share_truncated", "mean_tokens", "repetition")},
        }
        if key == "base":
            expected |= {"margin": 0, "loss_change": 0, "chosen_shift": 0, "rejected_shift": 0}
            assert row["margin_kept"] == row["beta"] == row["accuracy"] == ""
        else:
            trained, merged = metrics("train", key), metrics("merge", key)
            expected |= trained["heldout"] | {"beta": float(key.split("-")[1]), "steps": 8}
            equal = at_equal_length(key)
            found = (row["equal_length"], row["equal_length_low"], row["equal_length_high"])
            assert [float(value) for value in found] == [*map(in_git, (equal.mean, equal.low, equal.high))]
            to_recipe = expected_differences("sigmoid-0.5-8").get(key, [""] * 4)
            names = ("difference", "difference_low", "difference_high", "p_holm")
            shown = [row[f"recipe_{name}"] for name in names]
            assert [s and f"{float(s):{f}}" for s, f in zip(shown, ("+.2f",) * 3 + (".2f",), strict=True)] == to_recipe[
                :4
            ]
            assert row["loss"] == key.split("-")[0]
            assert row["margin_kept"] == ("" if merged["margin_kept"] is None else str(in_git(merged["margin_kept"])))
        numbers = {name: value if name == "beta" else in_git(value) for name, value in expected.items()}
        assert {name: float(row[name]) for name in expected} == numbers


def at_equal_length(key: str) -> LengthControlledDifference:
    """From the files, question by question."""
    tokens = {}
    for model in ("base", key):
        rows = map(json.loads, Path(f"data/mt_bench/model_answer/{model}.jsonl").read_text().splitlines())
        tokens[model] = {str(row["question_id"]): sum(row["choices"][0]["tokens"]) / 2 for row in rows}
    base, cell = (metrics("mtbench", model)["questions"] for model in ("base", key))
    apart = [(cell[number] - base[number], tokens[key][number] - tokens["base"][number]) for number in base]
    return length_controlled_difference([score for score, _ in apart], [longer for _, longer in apart])


def expected_row(key: str) -> list[str]:
    """A row of the printed table of scores, from the metrics."""
    judged = metrics("mtbench", key)
    scores = [f"{judged[name]:.2f}" for name in ("average", "average_low", "average_high")]
    return [key, *scores, *(["–"] * 4 if key == "base" else expected_differences()[key][:4])]


def training_row(key: str) -> list[str]:
    """A row of the printed table of trainings, from the metrics."""
    held, kept = metrics("train", key)["heldout"], metrics("merge", key)["margin_kept"]
    names = ("accuracy", "shorter_accuracy", "balanced_accuracy", "margin", "margin_low", "margin_high")
    return [key, *(f"{held[name]:.2f}" for name in names), "–" if kept is None else f"{kept:.1%}"]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Each table's rows, headings first."""
    tables: list[list[list[str]]] = []
    for before, line in pairwise(["", *text.splitlines()]):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


@pytest.mark.usefixtures("sweep")
def test_the_page_and_the_markdown_print_the_same_sentences_and_tables() -> None:
    page = Page(Path("reports/report.html").read_text())
    tables = page.tables
    assert [len(chart) - 1 for chart in page.charts] == [4, 4, 3 * 8, 4 * 8, 4, 4, 4, 4 * 8]  # rows of a chart's data
    assert tables[0][1:] == [expected_row(key) for key in ("base", *CELLS)]
    text = Path("reports/report.md").read_text()
    printed = markdown_tables(text)
    in_git = [table for table in tables if "training, s" not in table[0]]  # costs change with the machine's speed
    assert len(in_git) == len(tables) - 1
    assert [table[:1] + table[2:] for table in printed] == in_git
    assert all(set(cell) == {"-"} for table in printed for cell in table[1])
    assert {len(row) for table in tables for row in table} == {len(table[0]) for table in tables}
    lines = text.splitlines()
    assert [line.split("](")[1] for line in lines if line.startswith("![")] == [f"charts/{n}.png)" for n in CHARTS]
    assert [line for line in lines if line in page.leads] == page.leads
    assert len(page.leads) == 3
    assert [line.removeprefix("- ") for line in lines if line.startswith("- ")] == page.caveats
    assert len(page.caveats) == 6


@pytest.mark.usefixtures("sweep")
def test_the_smaller_tables_say_what_the_metrics_say() -> None:
    check, training, cost, left_out = Page(Path("reports/report.html").read_text()).tables[1:]
    assert training[1:] == [training_row(key) for key in CELLS]
    assert cost[1:] == [
        ["base", "–", "–", "–", "–", "20", "70", "0.25"],
        *([key, str(10 + i), "100", "1.50", "–", str(20 + i), "70", "0.25"] for i, key in enumerate(CELLS, 1)),
    ]
    assert check[1:] == [
        ["all, 15", "swapped", "0.53", "0.44", "0.61", "1.25", "-0.50", "3.00"],
        ["all, 15", "truncated", "0.56", "0.40", "0.72", "1.25", "-0.50", "3.00"],
    ]
    assert left_out[1:] == [["one sided", "5"], ["too long", "3"], ["over heldout max", "231"]]


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
            **{name: held[name] for name in ("accuracy", "margin", "margin_low", "margin_high")},
            "margin_kept": metrics("merge", entry["cell"])["margin_kept"],
        }
        expected = {name: in_git(value) for name, value in expected.items()}
        assert {name: value for name, value in entry.items() if name != "cell"} == expected
    assert summary["base"]["score"] == in_git(metrics("mtbench", "base")["average"])
    assert summary["base"]["margin"] == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("losses", "kept"), [(["ipo"], "no held-out margin"), (["sigmoid", "ipo"], "98.0% of the held-out margin")]
)
def test_a_margin_that_could_not_be_kept_is_left_out(in_tmp: Path, losses: list[str], kept: str) -> None:
    """In one of two cells, and in the one cell that there is."""
    write_sweep(in_tmp, grid={"loss": losses, "beta": [0.5], "steps": [8]}, loss="ipo", beta=0.5)
    report.main()
    summary = json.loads(Path("metrics/summary.json").read_text())
    assert summary["recipe"]["cell"] == "ipo-0.5-8"
    assert "margin_kept" not in summary["recipe"]
    assert {*summary["highest"]} == {*losses}
    assert f"The merges, in fp32, kept {kept}, computed in fp32 over the first 4 of these pairs; " in caveats()[-1]
    assert {path.stem for path in Path("metrics/train").iterdir()} == {f"{loss}-0.5-8" for loss in losses}


@pytest.mark.usefixtures("quick")
def test_cells_outside_the_grid_are_neither_read_nor_left(in_tmp: Path) -> None:
    write_sweep(in_tmp)
    report.main()
    first = Path("reports/cells.csv").read_bytes()
    stale = [
        *(Path(f"metrics/{kind}/sigmoid-0.9-8.json") for kind in ("train", "merge", "answer", "mtbench")),
        *(Path(f"metrics/cost/{kind}/sigmoid-0.9-8.json") for kind in ("train", "answer")),
        Path("data/mt_bench/model_answer/sigmoid-0.9-8.jsonl"),
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
def test_files_of_no_cell_are_named_and_left(in_tmp: Path) -> None:
    """DVC's cache has no copy of what FastChat's own programs download into its folders."""
    write_sweep(in_tmp)
    foreign, old = (Path("data/mt_bench/model_answer", f"{name}.jsonl") for name in ("gpt-4", "sigmoid-0.9-8"))
    for path in (foreign, old):
        path.write_text("{}\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(foreign))}: of no cell, and what stands in that .*; move"):
        report.main()
    assert foreign.exists()
    assert old.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "lost",
    [
        "metrics/prepare.json",
        "data/questions/question.jsonl",
        "metrics/answer/base.json",
        *(f"metrics/{kind}/base.json" for kind in ("mtbench", "cost/answer")),
        *(f"data/mt_bench/{kind}/base.jsonl" for kind in ("model_judgment/cells", "model_answer")),
        *(f"metrics/{kind}/ipo-0.5-8.json" for kind in ("train", "merge", "answer", "mtbench", "cost/train")),
        "metrics/cost/answer/ipo-0.5-8.json",
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


@pytest.mark.usefixtures("sweep")
def test_the_scores_of_each_question_are_kept_for_pairing() -> None:
    with Path("reports/questions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["question"]) for row in rows] == list(CATEGORY_OF)
    for row in rows:
        assert row["category"] == CATEGORY_OF[int(row["question"])]
        for key in ("base", *CELLS):
            assert float(row[key]) == in_git(metrics("mtbench", key)["questions"][row["question"]])


@pytest.mark.usefixtures("quick")
def test_the_first_of_equals_is_highest(in_tmp: Path) -> None:
    write_sweep(in_tmp)
    Path("metrics/mtbench/sigmoid-0.1-8.json").write_text(Path("metrics/mtbench/sigmoid-0.5-8.json").read_text())
    report.main()
    highest = json.loads(Path("metrics/summary.json").read_text())["highest"]
    assert highest["sigmoid"]["cell"] == "sigmoid-0.1-8"
