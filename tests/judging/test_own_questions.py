"""Questions of one's own: any number of turns, own categories, references where there are some; unscored turns."""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_server import Reply, chat_server, completion
from mtbench_data import (
    TEMPLATES,
    make_answers,
    make_questions,
    openai_judge,
    write_lines,
    write_params,
    write_questions,
)
from prefscan.common.errors import UserError
from prefscan.data.sources import own_questions
from prefscan.judging.fastchat import select_questions
from prefscan.judging.mtbench import build_turns, for_turn
from prefscan.judging.pairs import MODE as PAIRS
from prefscan.judging.single import MODE as SINGLE
from prefscan.stages import mtbench

OWN = [
    {"question_id": 1, "category": "Law", "turns": ["One?"]},
    {"question_id": 2, "category": "MATH", "turns": ["One?", "Two?", "Three?"]},
    {"question_id": 3, "category": "Law", "turns": ["One?", "Two?"]},
]
REFERENCES = {
    2: {"question_id": 2, "choices": [{"turns": ["Right 1", "Right 2", "Right 3"]}]},
    3: {"question_id": 3, "choices": [{"turns": ["Fair 1", "Fair 2"]}]},
}
QUESTIONS = {question["question_id"]: question for question in OWN}


def answers(by: str = "base") -> list[dict[str, Any]]:
    return [
        {
            "question_id": q["question_id"],
            "choices": [{"turns": [f"{by} {i}" for i, _ in enumerate(q["turns"], start=1)]}],
        }
        for q in OWN
    ]


def test_any_number_of_turns_and_references_where_there_are_some() -> None:
    turns = build_turns(QUESTIONS, answers(), TEMPLATES, REFERENCES, SINGLE)
    assert [(turn.question_id, turn.turn, turn.template) for turn in turns] == [
        (1, 1, "single-v1"),
        (2, 1, "single-math-v1"),
        (2, 2, "single-math-v1-multi-turn"),
        (2, 3, "single-math-v1-multi-turn"),
        (3, 1, "single-math-v1"),
        (3, 2, "single-math-v1-multi-turn"),
    ]
    third = turns[3].prompt.user
    assert third == ("One?|Right 1|Two?|Right 2|Three?|Right 3||One?|base 1|Two?|base 2|Three?|base 3")
    assert "Three?" not in turns[2].prompt.user


def test_pairs_have_any_number_of_turns_too() -> None:
    others = {answer["question_id"]: answer for answer in answers("other")}
    turns = build_turns(QUESTIONS, answers(), TEMPLATES, REFERENCES, PAIRS, others)
    assert len(turns) == 12
    assert "A: other 1|other 2|other 3|B: base 1|base 2|base 3" in turns[7].prompt.user.replace("|Three?", "")


def test_a_third_turn_is_asked_about_as_fastchat_does_the_second() -> None:
    template = {
        "system_prompt": "focus on the assistant's answer to the second user question.",
        "prompt_template": "### User:\n{question_1}\n\n### A:\n{answer_1}\n\n"
        "### User:\n{question_2}\n\n### A:\n{answer_2}\n\nEnd",
    }
    assert for_turn(template, 2) == template
    third = for_turn(template, 4)
    assert third["system_prompt"].endswith("the last user question.")
    assert third["prompt_template"].endswith(
        "{answer_2}\n\n### User:\n{question_3}\n\n### A:\n{answer_3}\n\n"
        "### User:\n{question_4}\n\n### A:\n{answer_4}\n\nEnd"
    )


def test_a_missing_or_short_reference_and_another_number_of_turns_are_refused() -> None:
    with pytest.raises(UserError, match=r"question 2 \(MATH\) needs a reference answer"):
        build_turns(QUESTIONS, answers(), TEMPLATES, {}, SINGLE)
    short = {2: {"choices": [{"turns": ["Right 1"]}]}}
    with pytest.raises(UserError, match=r"the reference answer to question 2 has 1 turns and the question has 3"):
        build_turns(QUESTIONS, answers(), TEMPLATES, short, SINGLE)
    with pytest.raises(UserError, match=r"question 1 has 1 turns and its answer 2; answer again"):
        build_turns(QUESTIONS, [answers()[0] | {"choices": [{"turns": ["a", "b"]}]}], TEMPLATES, {}, SINGLE)


def test_all_of_unequal_categories_can_be_chosen() -> None:
    assert select_questions(OWN, 3) == OWN
    with pytest.raises(UserError, match=r"answer\.questions: 4 cannot be drawn evenly .* up to 2, or all 3"):
        select_questions(OWN, 4)


def test_own_files_take_the_place_of_mt_benchs(in_tmp: Path) -> None:
    write_questions(in_tmp, make_questions(1))
    write_lines(in_tmp / "mine/question.jsonl", OWN)
    folder = in_tmp / "data/questions"
    own_questions(in_tmp / "mine", folder)
    assert (folder / "question.jsonl").read_bytes() == (in_tmp / "mine/question.jsonl").read_bytes()
    assert (folder / "reference_answer/stock.jsonl").read_text() == ""
    write_lines(in_tmp / "mine/reference_answer.jsonl", REFERENCES.values())
    own_questions(in_tmp / "mine", folder)
    for author in ("stock", "corrected"):
        assert len((folder / f"reference_answer/{author}.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"^questions\.folder: none/question\.jsonl is missing; write it, or set"):
        own_questions(Path("none"), folder)


def test_own_questions_are_judged_to_the_end(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    write_questions(in_tmp, OWN)
    for author in ("stock", "corrected"):
        write_lines(in_tmp / f"data/questions/reference_answer/{author}.jsonl", REFERENCES.values())
    write_lines(in_tmp / "data/mt_bench/model_answer/base.jsonl", answers())
    with chat_server(
        lambda request, _: completion("[[9]]" if "base 3" in request["messages"][1]["content"] else "[[5]]")
    ) as s:
        write_params(in_tmp, judge=openai_judge(s.url))
        mtbench.main("base")
        assert len(s.requests) == 6
    metrics = json.loads(Path("metrics/mtbench/base.json").read_text())
    assert (metrics["first_turn"], metrics["second_turn"], metrics["turn_3"]) == (5, 5, 9)
    assert metrics["categories"] == {"Law": 5, "MATH": pytest.approx(19 / 3)}
    assert metrics["average"] == pytest.approx(34 / 6)


def judged(root: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, **changes: Any) -> dict[str, Any]:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    questions = make_questions(1)
    write_questions(root, questions)
    write_lines(root / "data/mt_bench/model_answer/base.jsonl", make_answers(questions))
    with chat_server(answer) as server:
        write_params(root, judge=openai_judge(server.url, **changes))
        mtbench.main("base")
    return dict(json.loads(Path("metrics/mtbench/base.json").read_text()))


def shy(request: dict[str, Any], _: int) -> Reply:
    """No verdict on the second turn of the question of writing."""
    return completion("Well." if request["messages"][1]["content"].startswith("writing task 0?|") else "[[6]]")


def test_holes_fail_the_cell_by_default(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^1 of 16 turns have no score \(question 81 turn 2: no rating .* judge\.unscored: report$"
    ):
        judged(in_tmp, monkeypatch, shy)


def test_holes_are_counted_beside_every_average_on_request(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = judged(in_tmp, monkeypatch, shy, unscored="report")
    assert metrics["unscored"] == {
        "average": 1,
        "first_turn": 0,
        "second_turn": 1,
        "categories": {"writing": 1},
        "questions": 1,
    }
    assert metrics["average"] == 6
    assert sorted(metrics["questions"]) == [str(81 + i) for i in range(1, 8)]  # those with all turns alone
    rows = Path("data/mt_bench/model_judgment/cells/base.jsonl").read_text().splitlines()
    assert len(rows) == 15


def test_what_was_not_asked_is_never_a_hole(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty account in the middle of a sweep does not become an average over fewer turns."""

    def answer(_: dict[str, Any], number: int) -> Reply:
        body = b'{"error": {"message": "pay", "code": "insufficient_quota"}}'
        return completion("[[6]]") if number < 9 else Reply(429, body)

    with pytest.raises(
        UserError, match=r"turns have no score \(question .*: the server answered 429 \(RateLimitError: pay\)"
    ):
        judged(in_tmp, monkeypatch, answer, unscored="report", concurrency=1)
