"""A small sweep as the stages before report leave it in a workspace, and a reader of the pages that report makes."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from scipy import stats

from mtbench_data import local_judge, make_questions, write_lines, write_params
from prefscan.common.io import write_json, write_text
from prefscan.judging.mtbench import Judged, scores
from prefscan.judging.single import MODE

LOSSES, BETAS = ("sigmoid", "ipo"), (0.1, 0.5)
CELLS = [f"{loss}-{beta}-8" for loss in LOSSES for beta in BETAS]
# Ratings before the question's own: ipo-0.1-8 and sigmoid-0.5-8 are the highest of their losses.
LEVELS = {"base": 4.0, "sigmoid-0.1-8": 3.0, "sigmoid-0.5-8": 6.5, "ipo-0.1-8": 4.5, "ipo-0.5-8": 2.0}
CATEGORY_OF = {q["question_id"]: q["category"] for q in make_questions(1)}


def mtbench_metrics(judgements: list[dict[str, Any]], categories: dict[int, str]) -> dict[str, Any]:
    return scores(Judged(judgements, categories, []), MODE) | {"judge": "tiny", "references": "corrected", "usd": 0.25}


def write_sweep(root: Path, categories: dict[int, str] = CATEGORY_OF, words: str = "well", **params: Any) -> None:
    """params.yaml and the metrics of four cells, as the stages before report leave them in a workspace."""
    grid = {"loss": [*LOSSES], "beta": [*BETAS], "steps": [8]}
    recipe = {"loss": "sigmoid", "beta": 0.5, "steps": 8}
    stages = {"mtbench": params.get("grid", grid)} | params.pop("stages", {})
    known = {"grid": grid, "stages": stages, "judge": local_judge("models/base")}
    write_params(root, **(known | recipe | params))
    asked = [question | {"category": categories[question["question_id"]]} for question in make_questions(1)]
    write_lines(root / "data/questions/question.jsonl", asked)
    for i, (key, level) in enumerate(LEVELS.items()):
        judgements = [
            {
                "question_id": question,
                "model": key,
                "score": level + question % 3 / 2 + turn / 8 + question * i % 5 / 2,
                "turn": turn,
                "sample": 0,
                "judgment": f"Of {key}: {words}",
            }
            for question in CATEGORY_OF
            for turn in (1, 2)
        ]
        write_lines(root / f"data/mt_bench/model_judgment/cells/{key}.jsonl", judgements)
        answers = [
            {"question_id": question, "choices": [{"turns": [f"{key} {words}", "again"], "tokens": tokens}]}
            for question in CATEGORY_OF
            for tokens in ([9 + question % 4 * i, 9],)
        ]
        write_lines(root / f"data/mt_bench/model_answer/{key}.jsonl", answers)
        write_json(root / f"metrics/cost/answer/{key}.json", {"seconds": 20.0 + i, "tokens_per_second": 70.0})
        write_json(root / f"metrics/mtbench/{key}.json", mtbench_metrics(judgements, categories))
        write_json(
            root / f"metrics/answer/{key}.json",
            {"questions": 8, "mean_tokens": 50.0 + i, "share_truncated": i / 16, "repetition": i / 8},
        )
        if key == "base":
            continue
        heldout = {
            **{"accuracy": 0.5 + i / 20, "accuracy_low": 0.4 + i / 20, "accuracy_high": 0.6 + i / 20},
            **{"margin": 2.0 * i - 1, "margin_low": 2.0 * i - 2, "margin_high": 2.0 * i},
            **{"loss_change": -0.1 * i, "loss_change_low": -0.1 * i - 0.15, "loss_change_high": -0.1 * i + 0.15},
            **{"chosen_shift": -0.25 * i, "rejected_shift": -0.75 * i},
            **{"shorter_accuracy": 0.375, "balanced_accuracy": 0.5 + i / 40, "margin_per_token": i / 200},
        }
        cost = {"seconds": 10.0 + i, "tokens_per_second": 100.0, "peak_memory_gib": 1.5}
        write_json(root / f"metrics/train/{key}.json", {"loss": 0.5, "heldout": heldout})
        write_json(root / f"metrics/cost/train/{key}.json", cost)
        kept = None if key == "ipo-0.5-8" else 1 - i / 100  # None: the adapter had no margin to keep
        write_json(root / f"metrics/merge/{key}.json", {"margin_kept": kept, "weights_changed": 0.9, "pairs": 4})
        curve = "".join(f"{step},{0.7 - step / 100},{step / 50},0.5,1.0,0.001\n" for step in range(1, 9))
        header = "step,loss,reward_margin,reward_accuracy,grad_norm,learning_rate\n"
        write_text(root / f"metrics/curves/{key}.csv", header + curve)
    write_json(root / "metrics/judge.json", judge_metrics())
    dropped = {"one_sided": 5, "too_long": 3, "over_heldout_max": 231}
    write_json(root / "metrics/prepare.json", {"rows": 300, "train": 31, "heldout": 30, "dropped": dropped})


def judge_metrics(swapped_low: float = 0.44, truncated_low: float = 0.4) -> dict[str, Any]:
    """The part of metrics/judge.json that the report reads."""
    found = {
        "swapped": {"auc": 0.53, "auc_low": swapped_low, "auc_high": 0.61},
        "truncated": {"auc": 0.56, "auc_low": truncated_low, "auc_high": 0.72},
    }
    margin = {"margin": 1.25, "margin_low": -0.5, "margin_high": 3.0}
    versions = {n: auc | margin for n, auc in found.items()}
    return {"judge": "tiny", "questions": 15, "true_auc": 0.8, "all": {"questions": 15, "power": 0.65} | versions}


class Page(HTMLParser):
    """The tags, attributes, tables (headings first), lead paragraphs and caveats of a page.

    `tables` are those of metrics, `charts` those of the charts' data.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.charts: list[list[list[str]]] = []
        self.leads: list[str] = []
        self.caveats: list[str] = []
        self.table: list[list[str]] = []
        self.title = ""
        self.place = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.place = tag
        if tag == "table":
            self.table = []
            (self.tables if ("class", "summary") in attrs else self.charts).append(self.table)
        if tag == "tr":
            self.table.append([])
        if tag == "li":
            self.caveats.append("")
        if ("class", "lead") in attrs:
            self.leads.append("")
            self.place = "lead"

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")
        self.place = ""

    def handle_data(self, data: str) -> None:
        if self.place in ("td", "th"):
            self.table[-1].append(data)
        elif self.place == "lead":
            self.leads[-1] += data
        elif self.place == "li":
            self.caveats[-1] += data
        elif self.place == "h1":
            self.title += data


def in_git(value: float) -> float:
    """As files in git have a number: to three digits."""
    return float(f"{float(f'{value:.6g}'):.3g}")


def metrics(kind: str, key: str) -> Any:
    return json.loads(Path(f"metrics/{kind}/{key}.json").read_text())


def leads() -> list[str]:
    return [lead.strip() for lead in Page(Path("reports/report.html").read_text()).leads]


def caveats() -> list[str]:
    return [line.strip() for line in Page(Path("reports/report.html").read_text()).caveats]


def by_question(key: str) -> list[float]:
    return [value for _, value in sorted(metrics("mtbench", key)["questions"].items())]


def expected_differences(other: str = "base") -> dict[str, list[str]]:
    """The printed comparison with another model by scipy's paired t test, and Holm's correction as its definition."""
    theirs, compared = by_question(other), [key for key in CELLS if key != other]
    tests = {key: stats.ttest_rel(by_question(key), theirs) for key in compared}
    corrected, largest = {}, 0.0
    for place, key in enumerate(sorted(compared, key=lambda key: tests[key].pvalue)):
        largest = max(largest, (len(compared) - place) * tests[key].pvalue)
        corrected[key] = min(largest, 1.0)
    found = {}
    for key in compared:
        interval = tests[key].confidence_interval()
        apart = [a - b for a, b in zip(by_question(key), theirs, strict=True)]
        counts = [sum(d > 0 for d in apart), sum(d == 0 for d in apart), sum(d < 0 for d in apart)]
        numbers = (sum(apart) / len(apart), interval.low, interval.high)
        found[key] = [*(f"{n:+.2f}" for n in numbers), f"{corrected[key]:.2f}", *map(str, counts)]
    return found
