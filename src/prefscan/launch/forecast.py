"""What the grid of params.yaml would still take, before anything is spent: cells, hours, disk, and judging's cost.

    prefscan plan                                  # of params.yaml
    prefscan plan --workers 8                      # and when it would end on so many workers
    prefscan plan judge=gpt4 +experiment=zephyr    # of what `dvc exp run -S …` would compose

Where a model's answers are in the workspace, its prompts are built and looked up among the kept replies; where they are
not, or are stale, or other parameters would make them anew, all its calls are left, on answers of 8 bytes a token up to
their limit. Costs are upper bounds: a token for each byte of a prompt, and judgements as long as theirs. Reminders to
replies without a rating are not counted, nor what `agreement` has judged. Hours go by what finished cells took.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from prefscan.common.config import OpenAIJudge, Params, load
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl
from prefscan.common.paths import ANSWERS, QUESTIONS, REPLIES, judge_store
from prefscan.judging.budget import Spending, most_tokens, price
from prefscan.judging.fastchat import select_questions
from prefscan.judging.judge import Prompt
from prefscan.judging.mtbench import build_turns, load_questions, load_references
from prefscan.judging.openai import ChatJudge
from prefscan.launch.estimate import cells_left, measured_speed, sentences
from prefscan.repo.pipeline import CELL_STAGES, CHOICE, compose, stale_stages
from prefscan.repo.workspace import check_root
from prefscan.reporting.power import Design, Variances, detectable, measured_variances

BYTES_A_TOKEN = 8  # of an answer not yet there; English text has 4 to 5
FREE = ("judge", "judge_check", "agreement", "runtime", *CHOICE)  # parameters that change no model's answers


class Files(NamedTuple):
    """What every model's prompts are built of."""

    questions: dict[int, Any]
    templates: dict[str, Any]
    references: dict[int, Any]


def answer_stage(key: str) -> str:
    return "answer-base" if key == "base" else f"answer@{key}"


def read_answers(key: str, folder: Path | None) -> dict[int, Any] | None:
    """A model's answers by question id; None without a folder to look in, and where it has none."""
    path = folder and folder / f"{key}.jsonl"
    return {row["question_id"]: row for row in read_jsonl(path)} if path and path.exists() else None


def not_kept(prompts: list[Prompt], asker: ChatJudge, look: bool = True) -> tuple[int, int]:
    """The prompts without a kept reply, or all where nobody is to `look` for one, and the most tokens in them."""
    if look:  # one that stands there twice is asked once
        prompts = list({(prompt.system, prompt.user, prompt.sample): prompt for prompt in prompts}.values())
    calls = tokens = 0
    for prompt in prompts:
        request = asker.request(prompt)
        if not look or asker.replies.get(request, prompt.sample) is None:
            calls, tokens = calls + 1, tokens + most_tokens(request["messages"])
    return calls, tokens


def calls_left(key: str, params: Params, asker: ChatJudge, files: Files, folder: Path | None) -> tuple[int, int]:
    """Judge calls that a model's stage would still make, and the most input tokens that they have.

    `folder` holds answers; None where those that are there will be made anew.
    """
    judge = asker.judge
    pair = asker.mode.orders > 1
    if pair and key == judge.against:
        return 0, 0
    answers = read_answers(key, folder)
    others = read_answers(judge.against, folder) if pair else None
    known = answers is not None and (others is not None or not pair)
    if not known:
        text = " " * (BYTES_A_TOKEN * params.answer.max_new_tokens)
        chosen = select_questions(list(files.questions.values()), params.answer.questions)
        answers = {
            q["question_id"]: {"question_id": q["question_id"], "choices": [{"turns": [text] * len(q["turns"])}]}
            for q in chosen
        }
        others = answers if pair else None
    assert answers is not None  # read or made up
    turns = build_turns(files.questions, [*answers.values()], files.templates, files.references, asker.mode, others)
    prompts = [replace(turn.prompt, sample=sample) for turn in turns for sample in range(judge.samples)]
    return not_kept(prompts, asker, look=known)


def check_left(asker: ChatJudge, files: Files, count: int) -> tuple[int, int]:
    """Judge calls that the judge check would still make, and the most input tokens that they have."""
    from prefscan.judging.check import check_turns, repeated, versions  # half a second of imports

    answers = versions(files.questions, load_references("corrected"), count)
    turns = [turn for turn, _ in check_turns(files.questions, answers, files.templates, files.references, asker.mode)]
    return not_kept([turn.prompt for turn in [*turns, *repeated(turns)]], asker)


def models_settings(params: Params) -> dict[str, Any]:
    """The parameters that decide every cell's answers; a loss's hyperparameters decide those of its own cells."""
    return params.model_dump(exclude={*FREE, "losses"})


def retrained(params: Params, workspace: Params) -> list[str]:
    """The stages of the cells whose own loss has other hyperparameters than in the workspace."""
    before, after = dict(workspace.losses), dict(params.losses)
    cells = [cell for cell in params.grid.cells if before.get(cell.loss) != after.get(cell.loss)]
    return [f"{stage}@{cell.key}" for cell in cells for stage in CELL_STAGES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as `dvc exp run -S` takes them")
    parser.add_argument("--workers", type=int, help="cells at once; default: launch.cells")


# Standard deviations of P(positive) in the embedded default, rounded up: between trainings, of a loss on a prompt, of a
# training on a prompt, of a reply (docs/statistics.md).
ASSUMED = Variances(training=0.01, prompt=0.04, training_prompt=0.03, reply=0.17)


def power_sentences(params: Params, workspace: Params) -> list[str]:
    """What difference between two losses the design detects with 80 % power, and what a larger one would."""
    grid, sample, evaluate = params.grid, params.sample, params.evaluate
    losses = len(set(grid.loss))
    if not (sample and evaluate):
        return []
    if losses < 2:
        return ["One loss: there is nothing to compare it with."]
    if params.seeding == "shared":
        return ["seeding: shared, so no difference between losses can be told from a difference between trainings."]
    variances, source = measured(workspace) or (ASSUMED, "assumed standard deviations, of the embedded default")
    design = Design(losses, len(set(grid.beta)), len(set(grid.steps)), 1, sample.eval_prompts, evaluate.replies)
    if design.trainings < 2:
        return ["One training a loss: the variance between trainings cannot be known; add values of β to sweep.beta."]
    found = detectable(design, variances)
    return [
        f"Two losses whose mean reward over the grid differs by {found.difference:.3f} or more are told apart with "
        f"80 % power ({source}). One more seed would make it {found.one_more_seed:.3f}, one more β "
        f"{found.one_more_beta:.3f}, a quarter more prompts {found.quarter_more_prompts:.3f}, one more reply a prompt "
        f"{found.one_more_reply:.3f}."
    ]


def measured(workspace: Params) -> tuple[Variances, str] | None:
    """The variances of the workspace's own sweep, where its replies are there."""
    files = {cell: REPLIES / f"{cell.key}.jsonl" for cell in workspace.grid.cells}
    if workspace.seeding == "shared" or not workspace.reward or not all(path.exists() for path in files.values()):
        return None
    by_loss: dict[str, list[Any]] = {}
    for cell, path in files.items():
        scores = [[reply["score"] for reply in row["replies"]] for row in read_jsonl(path)]
        by_loss.setdefault(cell.loss, []).append(scores)
    rewards = np.array(list(by_loss.values()))
    return (measured_variances(rewards), "as this sweep's replies vary") if min(rewards.shape[:3]) > 1 else None


def main(overrides: list[str], workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: one at least")
    check_root()
    workspace = load()
    with TemporaryDirectory() as folder:
        params = compose(overrides, Path(folder) / "params.yaml") if overrides else workspace
    judge = params.judge
    keys = ["base", *(cell.key for cell in params.stages.mtbench.cells)]
    console = Console()
    console.print(f"Cells: {', '.join(cell.key for cell in params.grid.cells)}", highlight=False, soft_wrap=True)
    replies = 2 * params.answer.questions * len(keys)
    console.print(
        f"MT-Bench: {len(keys) - 1} cells and the base, {params.answer.questions} questions: {replies} replies to judge"
    )
    for sentence in power_sentences(params, workspace):
        console.print(sentence, highlight=False, soft_wrap=True)
    same = models_settings(params) == models_settings(workspace)
    stale = [*stale_stages(missing_data_is_stale=True), *retrained(params, workspace)] if same else None
    cells = cells_left(params, workspace, stale)
    speed = None if stale is None else measured_speed(workspace, stale)
    for sentence in sentences(cells, params, speed, workers or params.launch.cells):
        console.print(sentence, highlight=False)
    if params.judge != workspace.judge:
        console.print("The judge is another than in params.yaml: every model is judged anew.")
    if not isinstance(judge, OpenAIJudge):
        console.print(f"The judge {judge.name} runs on this machine and costs nothing.")
        return
    if not QUESTIONS.exists():
        raise UserError(f"{QUESTIONS} is missing; `dvc repro fetch@questions` fetches it, and nothing else")
    asker, files = ChatJudge(judge, judge_store()), Files(*load_questions(), load_references(judge.references))
    numbers = (Column(name, justify="right") for name in ("calls left", "tokens in", "tokens out", "USD"))
    table = Table(Column("judged", no_wrap=True), *numbers, title="Judging, at most")
    left = {}
    for key in keys:
        read = (key, judge.against) if asker.mode.orders > 1 else (key,)
        made = stale is not None and not any(answer_stage(model) in stale for model in read)
        left[key] = calls_left(key, params, asker, files, ANSWERS if made else None)
    left["judge check"] = check_left(asker, files, params.judge_check.questions)
    total = [0, 0, 0, 0.0]
    for name, (calls, tokens) in left.items():
        usd = price(judge.prices, tokens, calls * judge.max_tokens) * (1 - asker.discount)
        row = [calls, tokens, calls * judge.max_tokens, usd]
        total = [a + b for a, b in zip(total, row, strict=True)]
        table.add_row(name, *_printed(row, judge))
    table.add_section()
    table.add_row("all", *_printed(total, judge))
    console.print(table)
    spending = Spending(judge_store() / "spending.jsonl", judge.budget)
    budget = "no judge.budget" if judge.budget is None else f"judge.budget {judge.budget:.2f} USD"
    console.print(f"Spent so far: {spending.spent:.2f} USD; {budget}.")
    if judge.prices and (paid := spending.by_judge[judge.name]):
        usd = sum(paid) / len(paid)
        console.print(
            f"{len(paid)} requests to {judge.name} cost {usd:.4f} USD on average; at that, {total[0]:,} calls would "
            f"cost about {total[0] * usd:,.2f} USD."
        )


def _printed(row: list[int | float], judge: OpenAIJudge) -> list[str]:
    calls, inputs, outputs, usd = row
    return [f"{calls:,}", f"{inputs:,}", f"{outputs:,}", "no judge.prices" if judge.prices is None else f"{usd:,.2f}"]
