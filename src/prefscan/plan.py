"""What judging the grid of params.yaml would still cost, before anything is spent.

    python -m prefscan.plan                                  # of params.yaml
    python -m prefscan.plan judge=gpt4 +experiment=zephyr    # of what `dvc exp run -S …` would compose

Where a model's answers are in the workspace, its prompts are built and looked up among the kept replies; where they are
not, or other parameters would make them anew, all its calls are left, on answers of 8 bytes a token up to their limit.
Costs are upper bounds: a token for each byte of a prompt, and judgements as long as theirs. The calls of
the judge check and reminders are not counted.
"""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from dvc.exceptions import DvcException
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Column, Table

from prefscan.answer import select_questions
from prefscan.errors import UserError, run_stage
from prefscan.files import read_jsonl
from prefscan.judges.openai import ChatJudge
from prefscan.judges.spending import Spending, most_tokens, price
from prefscan.mtbench import build_turns, load_questions, load_references
from prefscan.params import OpenAIJudge, Params, load
from prefscan.paths import ANSWERS, judge_store

BYTES_A_TOKEN = 8  # of an answer not yet there; English text has 4 to 5
FREE = ("judge", "agreement", "sweep", "grid", "loss", "beta", "steps")  # parameters that change no model's answers


def compose(overrides: list[str]) -> Params:
    """params.yaml as Hydra would compose it; raises UserError for an override that it refuses."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        try:
            compose_and_dump(path, str(Path("conf").resolve()), None, "config", "", overrides)
        except (DvcException, HydraException) as error:
            raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from None
        return load(path)


def calls_left(key: str, params: Params, judge: OpenAIJudge, answered: bool) -> tuple[int, int]:
    """Judge calls that a model's stage would still make, and the most input tokens that they have."""
    if judge.mode == "pair" and key == judge.against:
        return 0, 0
    questions, templates = load_questions()
    references = load_references(judge.references)
    path, against = ANSWERS / f"{key}.jsonl", ANSWERS / f"{judge.against}.jsonl"
    pair = judge.mode == "pair"
    known = answered and path.exists() and (against.exists() or not pair)
    if known:
        answers = read_jsonl(path)
        others = {a["question_id"]: a for a in read_jsonl(against)} if pair else None
    else:
        text = " " * (BYTES_A_TOKEN * params.answer.max_new_tokens)
        answers = [
            {"question_id": question["question_id"], "choices": [{"turns": [text, text]}]}
            for question in select_questions(list(questions.values()), params.answer.questions)
        ]
        others = {a["question_id"]: a for a in answers} if pair else None
    asker = ChatJudge(judge, judge_store())
    calls = tokens = 0
    for turn in build_turns(questions, answers, templates, references, others):
        for sample in range(judge.samples):
            request = asker.request(replace(turn.prompt, sample=sample))
            if not known or asker.replies.get(request, sample) is None:
                calls, tokens = calls + 1, tokens + most_tokens(request["messages"])
    return calls, tokens


def main() -> None:
    params = compose(sys.argv[1:]) if sys.argv[1:] else load()
    workspace = load()
    judge = params.judge
    keys = ["base", *(cell.key for cell in params.grid.cells)]
    console = Console()
    turns = 2 * params.answer.questions
    console.print(
        f"{len(keys) - 1} cells and the base, {params.answer.questions} questions: {turns * len(keys)} replies to judge"
    )
    if not isinstance(judge, OpenAIJudge):
        console.print(f"The judge {judge.name} runs on this machine and costs nothing.")
        return
    answered = params.model_dump(exclude=set(FREE)) == workspace.model_dump(exclude=set(FREE))
    numbers = (Column(name, justify="right") for name in ("calls left", "tokens in", "tokens out", "USD"))
    table = Table(Column("model", no_wrap=True), *numbers, title="Judging, at most")
    total = [0, 0, 0, 0.0]
    for key in keys:
        calls, tokens = calls_left(key, params, judge, answered)
        row = [calls, tokens, calls * judge.max_tokens, price(judge.prices, tokens, calls * judge.max_tokens)]
        total = [a + b for a, b in zip(total, row, strict=True)]
        table.add_row(key, *_printed(row, judge))
    table.add_section()
    table.add_row("all", *_printed(total, judge))
    console.print(table)
    spent = Spending(judge_store() / "spending.jsonl", judge.budget).spent
    budget = "no judge.budget" if judge.budget is None else f"judge.budget {judge.budget:.2f} USD"
    console.print(f"Spent so far: {spent:.2f} USD; {budget}.")


def _printed(row: list[int | float], judge: OpenAIJudge) -> list[str]:
    calls, inputs, outputs, usd = row
    return [f"{calls:,}", f"{inputs:,}", f"{outputs:,}", "no judge.prices" if judge.prices is None else f"{usd:,.2f}"]


if __name__ == "__main__":
    run_stage(main)
