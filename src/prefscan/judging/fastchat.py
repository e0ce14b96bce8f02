"""FastChat's records, as they are read: each has the fields that prefscan uses, or a sentence says which has not."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl


def encodable(text: str) -> str:
    """Text that UTF-8 can hold; JSON can also escape one half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair") from None
    return text


def rating(score: float) -> float:
    if not 1 <= score <= 10:
        raise ValueError("not a number from 1 to 10; FastChat writes −1 where it found no rating")
    return score


Text = Annotated[str, AfterValidator(encodable)]
Turns = Annotated[list[Text], Field(min_length=1)]


class Record(BaseModel):
    model_config = ConfigDict(strict=True)  # fields that nobody reads may be there


class Question(Record):
    question_id: int
    category: Text
    turns: Turns


class JudgePrompt(Record):
    name: Text
    system_prompt: Text
    prompt_template: Text


class Choice(Record):
    turns: Turns


class Answer(Record):
    question_id: int
    choices: Annotated[list[Choice], Field(min_length=1)]


class ModelAnswer(Answer):
    model_id: Text


class Judgement(Record):
    question_id: int
    model: Text
    turn: Annotated[int, Field(ge=1)]
    score: Annotated[float, AfterValidator(rating)]


def read_records(path: Path, schema: type[Record], unique: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a file, as they stand there.

    Raises UserError, with the line of the first that is wrong, for a missing or wrong field, and for two records with
    the same values of the `unique` fields.
    """
    rows = read_jsonl(path)
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, start=1):
        try:
            schema.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the record"
            message = first["msg"].removeprefix("Value error, ")
            fault = f"{field} is {first['input']!r:.80}: {message[0].lower()}{message[1:]}"
            if first["type"] == "missing":
                fault = f"has no {field}"
            raise UserError(f"{path}, record {number}: {fault}; correct or remove the record") from None
        if unique:
            before = seen.setdefault(tuple(row[field] for field in unique), number)
            if before != number:
                raise UserError(
                    f"{path}, record {number} has the {', '.join(unique)} of record {before}; remove one of them"
                )
    return rows


def select_questions(questions: list[Any], count: int) -> list[Any]:
    """The first `count` / categories questions of each category, in order, or all.

    Raises UserError for an uneven split.
    """
    if count == len(questions):
        return questions
    by_category: dict[str, list[Any]] = defaultdict(list)
    for question in questions:
        by_category[question["category"]].append(question)
    each, rest = divmod(count, len(by_category))
    most = min(map(len, by_category.values()))
    if rest or each > most:
        raise UserError(
            f"answer.questions: {count} cannot be drawn evenly from {len(by_category)} categories of {most} questions; "
            f"choose a multiple of {len(by_category)} up to {len(by_category) * most}, or all {len(questions)}"
        )
    chosen = {id(q) for group in by_category.values() for q in group[:each]}
    return [q for q in questions if id(q) in chosen]
