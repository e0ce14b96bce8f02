"""Files in FastChat's formats, right and wrong: what is wrong ends with a sentence that names the record."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import changed
from mtbench_data import CATEGORIES, TEMPLATES, make_answers, make_questions
from prefscan.common.errors import UserError
from prefscan.judging.fastchat import (
    Answer,
    Judgement,
    JudgePrompt,
    ModelAnswer,
    Question,
    Record,
    read_records,
    select_questions,
)

QUESTION = make_questions(1)[0]
ANSWER = make_answers([QUESTION])[0]
JUDGEMENT = {"question_id": 81, "model": "base", "turn": 1, "score": 7.5, "judgment": "fine"}
RECORDS: list[tuple[type[Record], Any]] = [
    (Question, QUESTION),
    (JudgePrompt, next(iter(TEMPLATES.values()))),
    (ModelAnswer, ANSWER),
    (Judgement, JUDGEMENT),
]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records_are_read_as_they_stand(tmp_path: Path) -> None:
    other = ANSWER | {"question_id": 82}
    assert read_records(write(tmp_path / "a.jsonl", ANSWER, other), Answer, ["question_id"]) == [ANSWER, other]
    ends = [JUDGEMENT | {"score": score} for score in (1, 10.0)]
    assert read_records(write(tmp_path / "b.jsonl", *ends), Judgement) == ends


@pytest.mark.parametrize(
    ("schema", "record", "message"),
    [
        (Question, [], r"the record is \[\]: input should be a valid dictionary"),
        (Question, QUESTION | {"turns": []}, r"turns is \[\]: list should have at least 1 item"),
        (Question, QUESTION | {"turns": ["one", 2]}, "turns.1 is 2: input should be a valid string"),
        (Question, QUESTION | {"question_id": "81"}, "question_id is '81': input should be a valid integer"),
        (Question, QUESTION | {"category": "\ud800"}, "category is .*: the text has half of a surrogate pair"),
        (Answer, {"question_id": 81}, "has no choices"),
        (Answer, ANSWER | {"choices": []}, r"choices is \[\]: list should have at least 1 item"),
        (Judgement, JUDGEMENT | {"score": -1}, "score is -1: not a number from 1 to 10; FastChat writes −1"),
        (Judgement, JUDGEMENT | {"score": 0.99}, "score is 0.99: not a number from 1 to 10"),
        (Judgement, JUDGEMENT | {"score": 10.01}, "score is 10.01: not a number from 1 to 10"),
        (Judgement, JUDGEMENT | {"score": True}, "score is True: input should be a valid number"),
        (Judgement, JUDGEMENT | {"turn": 0}, "turn is 0: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, schema: type[Record], record: Any, message: str) -> None:
    right = next(row for kind, row in RECORDS if issubclass(kind, schema))
    path = write(tmp_path / "records.jsonl", right, record)
    with pytest.raises(UserError, match=rf"^{path}, record 2: {message}.*; correct or remove the record$"):
        read_records(path, schema)


def test_a_record_that_stands_there_twice_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ANSWER, ANSWER | {"question_id": 82}, ANSWER)
    with pytest.raises(UserError, match=rf"^{path}, record 3 has the question_id of record 1; remove one of them$"):
        read_records(path, Answer, ["question_id"])
    assert len(read_records(path, Answer)) == 3


@pytest.mark.parametrize(("schema", "record"), RECORDS)
def test_any_change_is_read_or_ends_with_a_sentence(schema: type[Record], record: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(changed(record), min_size=1, max_size=3))
    def check(rows: list[Any]) -> None:
        write(path, *rows)
        fault = ""
        try:
            assert read_records(path, schema) == json.loads(json.dumps(rows))
        except UserError as error:
            fault = str(error)
        assert not fault or (fault.startswith(f"{path}, ") and "\n" not in fault)

    check()


def test_any_bytes_are_read_or_end_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        fault, rows = "", []
        try:
            rows = read_records(path, Question)
        except UserError as error:
            fault = str(error)
        assert rows == []
        assert not fault or fault.startswith(str(path))

    check()


@pytest.mark.parametrize("count", [8, 40, 80])
def test_questions_are_drawn_evenly_and_in_order(count: int) -> None:
    chosen = select_questions(make_questions(), count)
    assert [q["category"] for q in chosen] == [c for c in CATEGORIES for _ in range(count // 8)]
    assert [q["question_id"] for q in chosen] == [81 + 10 * c + i for c in range(8) for i in range(count // 8)]


@pytest.mark.parametrize("count", [12, 1, 88, 160])
def test_an_uneven_draw_is_refused_with_a_remedy(count: int) -> None:
    with pytest.raises(
        UserError,
        match=rf"^answer\.questions: {count} cannot be drawn evenly from 8 categories of 10 questions; "
        "choose a multiple of 8 up to 80",
    ):
        select_questions(make_questions(), count)


def test_the_remedy_for_categories_of_unlike_size_works() -> None:
    questions = [*make_questions(2), *make_questions(3, ["writing"])]
    with pytest.raises(UserError, match="choose a multiple of 8 up to 16"):
        select_questions(questions, 24)
    assert len(select_questions(questions, 16)) == 16
