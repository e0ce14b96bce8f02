"""Instructions that a program can check: the share of a prompt's instructions that a reply follows.

IFEval (Zhou et al., arXiv 2311.07911) and its checkers, from the package if-verifiable. Prompts come as IFEval has
them: `prompt`, `instruction_id_list` and `kwargs`, one mapping of arguments an instruction. Utility and score are the
share of instructions followed, strict: of the reply as it is.

Two traps of the checkers are refused. Some need data that nltk downloads. And a checker without a usable argument draws
one at random: it would check something else in each run.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefscan.common.errors import UserError
from prefscan.common.intervals import share_interval
from prefscan.common.io import read_jsonl, write_jsonl
from prefscan.data.sources import PROMPTS_FILE
from prefscan.rewards.checks import accuracy_interval, rounded
from prefscan.rewards.reward import Prompt, Reward, last_text

DOWNLOADS = {  # instructions whose checkers ask nltk for data
    "length_constraints:number_sentences": "the sentence splitter punkt",
    "change_case:capital_word_frequency": "the word splitter punkt_tab",
}
METRICS = ("prompt_level_strict", "prompt_level_loose", "instruction_level_strict", "instruction_level_loose")


class Unusable(Exception):
    """Why an instruction cannot be checked; the first argument is a word for counts, the second a sentence."""


class NoDraw:
    """Stands in the checkers for `random`: whatever would be drawn, Unusable is raised."""

    def __getattr__(self, name: str) -> Any:
        raise Unusable("arguments", "kwargs lack a usable value, and the checker would draw one at random")


@cache
def registry() -> Mapping[str, Any]:
    """IFEval's checkers by instruction id: they draw nothing at random, detect languages by a seed, and log nothing.

    Their log has each reply whose language cannot be told, as it is, on standard error.
    """
    import langdetect
    from if_verifiable.ifeval import instructions, instructions_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    instructions.logging = quiet = logging.getLogger("prefscan.ifeval")
    quiet.disabled = True
    instructions.random = instructions_util.random = NoDraw()
    langdetect.DetectorFactory.seed = 0  # it samples; without a seed, two calls on one text may differ
    checkers: Mapping[str, Any] = INSTRUCTION_DICT
    return checkers


@dataclass(frozen=True)
class Outcome:
    """Whether a reply follows one instruction: as it is, and in any of IFEval's 8 variants of it."""

    instruction: str
    strict: bool
    loose: bool


def build_checker(instruction: str, arguments: Mapping[str, Any]) -> Any:
    """The checker of an instruction with its arguments, of which null ones are absent, as in IFEval's file."""
    checker = registry()[instruction](instruction)
    checker.build_description(**{key: value for key, value in arguments.items() if value is not None})
    return checker


def refuse_unusable(instruction: str, arguments: Mapping[str, Any]) -> None:
    """Raises Unusable for an instruction that its checker could not decide, or would guess at."""
    if instruction in DOWNLOADS:
        raise Unusable("download", f"its checker needs {DOWNLOADS[instruction]}, which nltk downloads")
    if instruction not in registry():
        raise Unusable("unknown", "IFEval has no such instruction")
    try:
        checker = build_checker(instruction, arguments)
        checker.check_following("A reply to try it on.")  # keywords are regular expressions, and may be malformed
    except Unusable:
        raise
    except Exception as error:  # whatever a checker of the package makes of kwargs that it was not written for
        raise Unusable("arguments", f"kwargs {dict(arguments)!r:.80} ({type(error).__name__}: {error!s:.80})") from None


def variants(reply: str) -> list[str]:
    """IFEval's 8 variants of a reply: without first line, last line or both, each with and without asterisks."""
    from if_verifiable.common import get_loose_transformations

    texts: list[str] = get_loose_transformations(reply)
    return texts


def follows(checker: Any, reply: str) -> bool:
    """An empty reply follows nothing, as IFEval has it; JSON nested too deep for Python's reader is not followed."""
    try:
        return bool(reply.strip()) and bool(checker.check_following(reply))
    except RecursionError:
        return False


def parse_row(row: Any, place: str) -> dict[str, Any]:
    """A row with prompt, instruction_id_list and kwargs of its instructions; raises UserError for another shape."""
    names = ("prompt", "instruction_id_list", "kwargs")
    if not isinstance(row, dict) or any(name not in row for name in names):
        raise UserError(f"{place}: expected {', '.join(names)}, found {row!r:.100}; correct or remove the row")
    prompt, ids, kwargs = (row[name] for name in names)
    shaped = isinstance(ids, list) and ids and isinstance(kwargs, list) and len(ids) == len(kwargs)
    if not (shaped and isinstance(prompt, str) and prompt.strip() and all(isinstance(k, dict) for k in kwargs)):
        raise UserError(
            f"{place}: expected a prompt and one mapping in kwargs for each of instruction_id_list, found "
            f"{row!r:.100}; correct or remove the row"
        )
    return {name: row[name] for name in names}


def read_prompts(path: Path, unusable: str = "refuse") -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The prompts of a JSON-lines file, and how many rows were left out by reason.

    `unusable: leave_out` leaves out prompts with an instruction that cannot be checked; `refuse` raises UserError for
    the first. Raises UserError too for rows of another shape, a prompt that occurs twice, and where none is left.
    """
    rows: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for number, raw in enumerate(read_jsonl(path), start=1):
        place = f"{path}, row {number}"
        row = parse_row(raw, place)
        try:
            for instruction, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
                try:
                    refuse_unusable(instruction, arguments)
                except Unusable as error:
                    if unusable == "refuse":
                        raise UserError(
                            f"{place}: instruction {instruction} cannot be checked: {error.args[1]}; remove the row, "
                            "or set reward.unusable: leave_out"
                        ) from None
                    raise
        except Unusable as error:
            left_out[error.args[0]] += 1
            continue
        if row["prompt"] in rows:
            raise UserError(f"{place}: the prompt {row['prompt']!r:.60} occurs twice; remove one of the rows")
        rows[row["prompt"]] = row
    if not rows:
        raise UserError(
            f"{path}: no prompt is left ({dict(left_out) or 'the file is empty'}); name another file in reward.source"
        )
    return list(rows.values()), dict(left_out)


class InstructionChecks(Reward):
    """The checkers of a set of prompts; a reply is scored by those of its prompt."""

    utility_name = score_name = "share of instructions followed"

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "checkable") -> None:
        self.name = name
        self.rows = {row["prompt"]: row for row in rows}

    @classmethod
    def load(cls, folder: Path, name: str) -> "InstructionChecks":
        return cls(read_prompts(folder / PROMPTS_FILE)[0], name)

    def save(self, folder: Path) -> None:
        write_jsonl(folder / PROMPTS_FILE, self.rows.values())

    def outcomes(self, prompt: Prompt, reply: str) -> list[Outcome]:
        """Of each instruction in the prompt's order; raises UserError for a prompt without instructions."""
        row = self.rows.get(last_text(prompt))
        if row is None:
            raise UserError(
                f"reward {self.name}: the prompt {last_text(prompt)!r:.60} has no instructions; take prompts from "
                "reward.source"
            )
        outcomes = []
        for instruction, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            # A checker of its own for each reply: some change their arguments while they check.
            checker = build_checker(instruction, arguments)
            strict = follows(checker, reply)
            loose = strict or any(follows(checker, text) for text in variants(reply))
            outcomes.append(Outcome(instruction, strict, loose))
        return outcomes

    def _utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        found = [self.outcomes(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        return [sum(outcome.strict for outcome in row) / len(row) for row in found]


def ifeval_metrics(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, dict[str, float]]:
    """IFEval's four accuracies of one reply a prompt, with 95 % intervals.

    Prompt level: the share of prompts all of whose instructions are followed, with Wilson's interval. Instruction
    level: the share of instructions followed, clustered by prompt.
    """
    metrics = {}
    for mode in ("strict", "loose"):
        followed = [[bool(getattr(outcome, mode)) for outcome in row] for row in outcomes]
        metrics[f"prompt_level_{mode}"] = rounded(share_interval(sum(map(all, followed)), len(followed)))
        flat = [float(one) for row in followed for one in row]
        clusters = [prompt for prompt, row in enumerate(followed) for _ in row]
        metrics[f"instruction_level_{mode}"] = rounded(accuracy_interval(flat, clusters))
    return {name: metrics[name] for name in METRICS}


def describe(rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Figures of metrics/reward.json: prompts, instructions by kind, and what was left out."""
    kinds = Counter(instruction for row in rows for instruction in row["instruction_id_list"])
    return {"prompts": len(rows), "left_out": dict(left_out), "instructions": dict(sorted(kinds.items()))}
