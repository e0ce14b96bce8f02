"""The judge check with judges whose taste is known, and with a real tiny one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_server import Reply, chat_server, completion
from mtbench_data import (
    TEMPLATES,
    local_judge,
    make_answers,
    make_questions,
    make_references,
    openai_judge,
    write_lines,
    write_params,
    write_questions,
)
from prefscan.common.errors import UserError
from prefscan.judging.check import REPEATS, agree, check_turns, compare, first_quarter, swap, versions
from prefscan.stages import judge_check

QUESTIONS = {q["question_id"]: q for q in make_questions(7)}
GOOD = {
    number: {
        "question_id": number,
        "choices": [{"index": 0, "turns": [f"Right {number} is a  long\nanswer of β.", ""]}],
    }
    for number, question in QUESTIONS.items()
    if question["category"] in ("math", "reasoning", "coding")
}
JUDGE = Path("metrics/judge.json")


def test_no_answer_keeps_its_question() -> None:
    for count in range(2, 12):
        answers = {number: f"answer {number}" for number in range(count)}
        swapped = swap(answers)
        assert sorted(swapped) == sorted(answers)
        assert sorted(swapped.values()) == sorted(answers.values())
        assert all(swapped[number] != answers[number] for number in answers)
        assert swap(dict(reversed(answers.items()))) == swapped


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b\n c d e f g h i", "a b"), ("one", "one"), (" a b c d", " a"), ("a b c d e f g", "a")],
)
def test_the_first_quarter_keeps_its_layout(text: str, expected: str) -> None:
    assert first_quarter(text) == expected


def test_swaps_stay_within_the_category_and_the_shortest_are_checked() -> None:
    long = max(GOOD)
    longer = GOOD | {long: {"question_id": long, "choices": [{"turns": ["word " * 50, ""]}]}}
    found = versions(QUESTIONS, longer)
    assert len(found) == 15
    assert long not in found
    good = {number: texts["good"] for number, texts in found.items()}
    for number, texts in found.items():
        (owner,) = (other for other, text in good.items() if text == texts["swapped"])
        assert owner != number
        assert QUESTIONS[owner]["category"] == QUESTIONS[number]["category"]
        assert texts["truncated"] == f"Right {number}"


def test_a_category_with_one_reference_is_refused() -> None:
    math = [number for number in GOOD if QUESTIONS[number]["category"] == "math"]
    few = {number: row for number, row in GOOD.items() if number not in math[1:]}
    with pytest.raises(UserError, match=r"corrected\.jsonl has 1 reference answers of category math"):
        versions(QUESTIONS, few)
    two = {number: row for number, row in GOOD.items() if number not in math[2:]}
    assert versions(QUESTIONS, two)[math[0]]["swapped"] == versions(QUESTIONS, two)[math[1]]["good"]


def test_a_reference_without_question_or_words_is_refused() -> None:
    number, reference = next(iter(GOOD.items()))
    with pytest.raises(UserError, match=r"the reference answer to question 999 has no question; fetch again$"):
        versions(QUESTIONS, GOOD | {999: reference})
    with pytest.raises(UserError, match=rf"the reference answer to question {number} has no words; fetch again$"):
        versions(QUESTIONS, GOOD | {number: {"choices": [{"turns": [" \n", ""]}]}})


def test_the_reference_is_shown_in_one_prompt_only() -> None:
    shown = {r["question_id"]: r for r in make_references([*QUESTIONS.values()], "stock")}
    answers = versions(QUESTIONS, GOOD)
    turns = check_turns(QUESTIONS, answers, TEMPLATES, shown, "single")
    assert len(turns) == 90
    for i, turn in enumerate(turns):
        number, version = [*answers][i % 45 // 3], ("good", "swapped", "truncated")[i % 3]
        assert turn.question_id == number
        assert turn.prompt.user.endswith(f"Reply: {answers[number][version]}")
        assert ("stock first" in turn.prompt.user) == (turn.template == "single-math-v1") == (i >= 45)
    del shown[turns[0].question_id]
    with pytest.raises(UserError, match=f"question {turns[0].question_id} needs a reference answer"):
        check_turns(QUESTIONS, answers, TEMPLATES, shown, "single")


def prepare(root: Path, judge: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    write_params(root, judge=judge, **params)
    write_questions(root, [*QUESTIONS.values()])
    write_lines(root / "data/questions/reference_answer/corrected.jsonl", GOOD.values())


def knowing(request: dict[str, Any], _: int) -> Reply:
    """9 for the whole right answer to the question asked, which stands in no prompt else, and 2 otherwise."""
    text = request["messages"][1]["content"]
    number = next(n for n, q in QUESTIONS.items() if f"Asked: {q['turns'][0]}\n" in text)
    return completion("[[9]]" if f"Reply: Right {number} is a  long\nanswer" in text else "[[2]]")


MARGIN = ("margin", "margin_low", "margin_high")


def proportion_of_all(trials: int) -> Any:
    """The lower end of Wilson's interval where all trials succeed: n / (n + z²)."""
    return pytest.approx(trials / (trials + 1.959964**2))


def test_a_judge_that_knows_can_tell(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(knowing) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        judge_check.main()
        assert len(server.requests) == 90 + REPEATS  # the repeats are asked again, not read from the store
    metrics = json.loads(JUDGE.read_text())
    assert (metrics["judge"], metrics["references"], metrics["questions"]) == ("gpt-4", "stock", 15)
    assert metrics["repeat"] == {"prompts": 6, "largest_difference": 0, "deterministic": True}
    assert metrics["agreement"] is None
    for name in ("without_reference", "with_reference"):
        found = metrics[name]
        assert (found["mean_good"], found["mean_swapped"], found["mean_truncated"]) == (9, 2, 2)
        for bad in ("swapped", "truncated"):
            low = proportion_of_all(15)
            assert found[bad] == {"auc": 1, "auc_low": low, "auc_high": 1} | dict.fromkeys(MARGIN, 7)
    printed = capsys.readouterr().out
    for name in ("without_reference", "with_reference"):
        for bad in ("swapped", "truncated"):
            assert f"{name}, {bad}: AUC 1.00 [0.80, 1.00]\n" in printed


def test_a_judge_of_pairs_that_knows_can_tell(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The good answer wins against both bad ones in both orders; a judge that likes place A ends in ties."""

    def knows(request: dict[str, Any], _: int) -> Reply:
        text = request["messages"][1]["content"]
        number = next(n for n, q in QUESTIONS.items() if text.startswith(q["turns"][0]))
        first, second = text.split("A: ")[1].split("|B: ")
        right = f"Right {number} is a  long\nanswer"
        assert first.startswith(right) != second.startswith(right)
        return completion("[[A]]" if first.startswith(right) else "[[B]]")

    for rate, auc, told in ((knows, 1.0, True), (lambda *_: completion("[[A]]"), 0.5, False)):
        with chat_server(rate) as server:
            prepare(in_tmp, openai_judge(server.url, mode="pair"), monkeypatch)
            judge_check.main()
            assert len(server.requests) == 15 * 2 * 2 * 2 + REPEATS
        metrics = json.loads(JUDGE.read_text())
        assert metrics["mode"] == "pair"
        for name in ("without_reference", "with_reference"):
            for bad in ("swapped", "truncated"):
                found = metrics[name][bad]
                assert found["auc"] == auc
                assert (found["auc_low"] > 0.5) == told


def test_a_judge_that_likes_length_alone_cannot_tell_swapped_ones(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(request: dict[str, Any], _: int) -> Reply:
        return completion("[[8]]" if "answer of" in request["messages"][1]["content"] else "[[3]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        judge_check.main()
    found = json.loads(JUDGE.read_text())["without_reference"]
    assert (found["swapped"]["auc"], found["swapped"]["margin"]) == (0.5, 0)
    assert (found["truncated"]["auc"], found["truncated"]["margin"]) == (1, 5)


def test_mildness_to_a_question_is_no_want_of_discrimination() -> None:
    """Each good answer lies 0.4 above the bad one of its own question, and below those of most others."""
    good = [2 + number / 2 for number in range(15)]
    found = compare(good, [score - 0.4 for score in good])
    assert (found["auc"], found["auc_low"]) == (1, proportion_of_all(15))
    assert found["margin"] == pytest.approx(0.4)
    tied = compare([*good[:14], 0.1 + 0.2], [*good[:14], 0.3])
    assert tied["auc"] == 0.5
    assert tied["auc_low"] < 0.5 < tied["auc_high"]


def test_a_judge_that_changes_its_mind_is_not_deterministic(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda _, number: completion("[[4]]" if number < 90 else "[[6]]")) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        judge_check.main()
    repeat = json.loads(JUDGE.read_text())["repeat"]
    assert repeat == {"prompts": 6, "largest_difference": 2, "deterministic": False}


def test_a_local_judge_is_deterministic(in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(in_tmp, local_judge(tiny_model), monkeypatch)
    judge_check.main()
    first = JUDGE.read_bytes()
    judge_check.main()
    assert JUDGE.read_bytes() == first
    assert json.loads(first)["repeat"]["deterministic"]


MODELS = ("left", "right")
AGREEMENT = {"judgements": "theirs.jsonl", "answers": "answers.jsonl"}


def test_agreement_by_hand() -> None:
    keys = [(question, model, turn) for question in (81, 82) for model in MODELS for turn in (1, 2)]
    theirs = dict(zip(keys, [1.0, 2, 3, 4, 5, 6, 7, 6], strict=True))
    assert agree({key: 10 - score for key, score in theirs.items()}, theirs)["pearson"] == pytest.approx(-1)
    found = agree(dict(zip(keys, [1.0, 2, 3, 4, 5, 7, 7, 6], strict=True)), theirs)
    assert (found["questions"], found["turns"]) == (2, 8)
    # Left against right: three votes agree, and in the last one the others' scores tie.
    assert (found["pairwise_with_ties"], found["pairwise_without_ties"]) == (0.75, 1)
    expected = np.corrcoef([1, 2, 3, 4, 5, 7, 7, 6], [1, 2, 3, 4, 5, 6, 7, 6])[0, 1]
    assert found["pearson"] == pytest.approx(expected)
    assert 0.9 < found["spearman"] < 1


def test_agreement_that_is_not_defined_is_none() -> None:
    theirs = {(question, "left", 1): 5.0 for question in (81, 82, 83)}
    found = agree({key: float(key[0]) for key in theirs}, theirs)
    names = ("spearman", "pearson", "pairwise_with_ties", "pairwise_without_ties")
    assert {found[name + end] for name in names for end in ("", "_low", "_high")} == {None}
    with pytest.raises(UserError, match="1 questions; an interval needs two or more"):
        agree({(81, "left", 1): 1.0}, {(81, "left", 1): 1.0})


def write_agreement(root: Path, scores: dict[tuple[int, str, int], float]) -> None:
    rows = [{"question_id": q, "model": m, "turn": t, "score": score} for (q, m, t), score in scores.items()]
    write_lines(root / "theirs.jsonl", rows)
    asked = [QUESTIONS[number] for number in sorted({q for q, _, _ in scores})]
    write_lines(root / "answers.jsonl", [row for model in MODELS for row in make_answers(asked, model)])


def test_the_judge_is_compared_with_others(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(request: dict[str, Any], _: int) -> Reply:
        return completion("[[8]]" if "right says" in request["messages"][1]["content"] else "[[4]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch, agreement=AGREEMENT)
        keys = [(question, model, 1) for question in [*QUESTIONS][:4] for model in MODELS]
        write_agreement(in_tmp, {key: 9.0 if key[1] == "right" else 3.0 for key in keys})
        judge_check.main()
    found = json.loads(JUDGE.read_text())["agreement"]
    assert (found["questions"], found["turns"]) == (4, 8)
    assert found["spearman"] == pytest.approx(1)
    assert found["pairwise_with_ties"] == found["pairwise_without_ties_low"] == 1


@pytest.mark.parametrize("field", ["question_id", "model", "turn", "score"])
def test_a_judgement_without_a_field_is_refused(in_tmp: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1"), monkeypatch, agreement=AGREEMENT)
    row = {"question_id": 81, "model": "left", "turn": 1, "score": 5}
    write_lines(in_tmp / "theirs.jsonl", [row, {k: v for k, v in row.items() if k != field}])
    with pytest.raises(UserError, match=rf"theirs\.jsonl, record 2: has no {field}"):
        judge_check.main()


@pytest.mark.parametrize("score", [-1, 11, True, "7", None])
def test_a_score_that_is_none_is_refused(in_tmp: Path, score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1"), monkeypatch, agreement=AGREEMENT)
    write_agreement(in_tmp, {(81, "left", 1): score})
    with pytest.raises(UserError, match=r"record 1: score is .*: (no number from 1 to 10|input should be a val)"):
        judge_check.main()


def test_judgements_without_their_answers_are_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1"), monkeypatch, agreement=AGREEMENT)
    write_agreement(in_tmp, {(81, "left", 1): 5.0, (82, "left", 2): 6.0})
    answers = (in_tmp / "answers.jsonl").read_text().splitlines()
    (in_tmp / "answers.jsonl").write_text(answers[0] + "\n")
    with pytest.raises(UserError, match=r"agreement\.answers: .* has no answer of left to question 82 turn 2"):
        judge_check.main()
    (in_tmp / "answers.jsonl").write_text(answers[-1] + "\n")
    with pytest.raises(UserError, match=r"agreement\.answers: answers\.jsonl has no answers of left"):
        judge_check.main()
    (in_tmp / "answers.jsonl").write_text('{"question_id": 81}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl, record 1: has no choices"):
        judge_check.main()
