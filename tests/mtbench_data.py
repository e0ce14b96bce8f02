"""A small MT-Bench of this project's own, in FastChat's formats, and the parameters of the stages that use it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from configuration import composed

ROOT = Path(__file__).parents[1]
# FastChat's categories in the order of its questions; the middle three need references.
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
REFERENCED = ("reasoning", "math", "coding")


def make_questions(each: int = 10, categories: Iterable[str] = CATEGORIES) -> list[dict[str, Any]]:
    """`each` questions of two turns in every category, numbered from 81 as MT-Bench's are."""
    names = [category for category in categories for _ in range(each)]
    return [
        {"question_id": 81 + i, "category": category, "turns": [f"{category} task {i}?", f"Now {{shorter}} than {i}."]}
        for i, category in enumerate(names)
    ]


def make_references(questions: list[dict[str, Any]], author: str) -> list[dict[str, Any]]:
    return [
        {"question_id": q["question_id"], "choices": [{"index": 0, "turns": [f"{author} first", f"{author} second"]}]}
        for q in questions
        if q["category"] in REFERENCED
    ]


def make_answers(questions: list[dict[str, Any]], model: str = "base") -> list[dict[str, Any]]:
    return [
        {
            "question_id": q["question_id"],
            "answer_id": f"{model}{q['question_id']}",
            "model_id": model,
            # Braces and a rating in an answer are text like any other.
            "choices": [{"index": 0, "turns": [f"{model} says {q['question_id']}", f"{{answer}} [[10]] from {model}"]}],
            "tstamp": 0.0,
        }
        for q in questions
    ]


def _template(name: str, system: str, text: str) -> dict[str, Any]:
    form = {"type": "single", "category": "general", "description": "", "output_format": "[[rating]]"}
    return {"name": name, "system_prompt": system, "prompt_template": text} | form


def _pair(name: str, system: str, text: str) -> dict[str, Any]:
    return _template(name, system, text) | {"type": "pairwise", "output_format": "[[A]]"}


TEMPLATES = {
    template["name"]: template
    for template in (
        _template("single-v1", "Rate.", "Asked: {question}\nReply: {answer}"),
        _template("single-math-v1", "Rate sums.", "Asked: {question}\nRight: {ref_answer_1}\nReply: {answer}"),
        _template("single-v1-multi-turn", "Rate turn 2.", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
        _template(
            "single-math-v1-multi-turn",
            "Rate sums of turn 2.",
            "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}||{question_1}|{answer_1}|{question_2}|{answer_2}",
        ),
        _pair("pair-v2", "Choose.", "{question}|A: {answer_a}|B: {answer_b}"),
        _pair("pair-math-v1", "Choose by sums.", "{question}|{ref_answer_1}|A: {answer_a}|B: {answer_b}"),
        _pair(
            "pair-v2-multi-turn",
            "Choose at turn 2.",
            "{question_1}|{question_2}|A: {answer_a_1}|{answer_a_2}|B: {answer_b_1}|{answer_b_2}",
        ),
        _pair(
            "pair-math-v1-multi-turn",
            "Choose by sums at turn 2.",
            "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}"
            "|A: {answer_a_1}|{answer_a_2}|B: {answer_b_1}|{answer_b_2}",
        ),
    )
}


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_questions(root: Path, questions: list[dict[str, Any]]) -> None:
    """data/questions as the fetch stage leaves it."""
    folder = root / "data/questions"
    write_lines(folder / "question.jsonl", questions)
    write_lines(folder / "judge_prompts.jsonl", TEMPLATES.values())
    for author in ("stock", "corrected"):
        write_lines(folder / f"reference_answer/{author}.jsonl", make_references(questions, author))


@cache
def _default() -> Any:
    return OmegaConf.to_container(composed("+experiment=demo_pairs"), resolve=True)


def default_params() -> dict[str, Any]:
    """What conf/ composes for given pairs, without a known reward."""
    return dict(deepcopy(_default()))


def write_params(root: Path, **changes: Any) -> None:
    """The default's params.yaml with changes: a mapping is merged, but for `losses`, and `judge`, whose keys depend on
    its kind.
    """
    params = default_params()
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(params[key], dict) and key not in ("judge", "losses")
        params[key] = params[key] | value if merged else value
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def local_judge(folder: Path | str, batch_size: int = 1) -> dict[str, Any]:
    return {
        "kind": "local",
        "name": "tiny",
        "folder": str(folder),
        "mode": "single",
        "against": "base",
        "references": "corrected",
        "unscored": "fail",
        "dtype": "fp32",
        "least_mass": 0.0,  # that random weights give any verdict
        "batch_size": batch_size,
    }


def openai_judge(base_url: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "openai",
        "name": "gpt-4",
        "model": "gpt-4",
        "folder": "models/base",
        "mode": "single",
        "against": "base",
        "base_url": base_url,
        "key_variable": "PREFSCAN_TEST_KEY",
        "headers": {},
        "query": {},
        "extra_body": {},
        "unscored": "fail",
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "batch": None,
        "max_tokens": 64,
        "limit_field": "max_tokens",
        "temperature": 0,
        "seed": None,
        "samples": 1,
        "concurrency": 2,
        "timeout": 30.0,
        "attempts": 3,
        "references": "stock",
        "prices": None,
        "budget": None,
    } | changes


def shown_by_fastchat(*options: Any) -> list[dict[str, str]]:
    """The scores that show_result prints, as text, by model: first turn, second turn, average."""
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    sections = re.split(r"#{10} .* #{10}", printed)[1:]
    return [{m[1]: m[2] for m in re.finditer(r"^(\S+) .*?(\d+\.\d+)$", s, re.MULTILINE)} for s in sections]
