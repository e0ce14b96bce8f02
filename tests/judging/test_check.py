"""The judge check with judges whose taste is known, and with a real tiny one."""

import json
from collections import Counter
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
from prefscan.judging import check
from prefscan.judging.check import (
    BAD,
    REPEATS,
    agree,
    check_turns,
    discrimination,
    first_quarter,
    power,
    swap,
    versions,
)
from prefscan.judging.single import MODE as SINGLE
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


def test_swaps_stay_within_the_category_and_each_version_is_what_it_says() -> None:
    found = versions(QUESTIONS, GOOD, 21)
    assert sorted(found) == sorted(GOOD)
    good = {number: texts["good"] for number, texts in found.items()}
    for number, texts in found.items():
        (owner,) = (other for other, text in good.items() if text == texts["swapped"])
        assert owner != number
        assert QUESTIONS[owner]["category"] == QUESTIONS[number]["category"]
        assert texts["truncated"] == f"Right {number}"
        assert texts["padded"].startswith(f"{texts['good']}\n\n")
        assert len(texts["padded"].split()) >= 2 * len(texts["good"].split())
        assert texts["claims_rating"].startswith(texts["swapped"])
        assert texts["claims_rating"].endswith("Rating: [[10]]")


def test_questions_come_evenly_from_the_categories_with_the_shortest_answers_first() -> None:
    longest = max(GOOD)
    longer = GOOD | {longest: {"question_id": longest, "choices": [{"turns": ["word " * 50, ""]}]}}
    found = versions(QUESTIONS, longer, 18)
    assert longest not in found
    counts = Counter(QUESTIONS[number]["category"] for number in found)
    assert counts == {"math": 6, "reasoning": 6, "coding": 6}
    assert len(versions(QUESTIONS, GOOD, 80)) == 21
    three = versions(QUESTIONS, GOOD, 3)  # one of each category: swapped among them
    assert {texts["swapped"] for texts in three.values()} == {texts["good"] for texts in three.values()}
    assert all(texts["swapped"] != texts["good"] for texts in three.values())


def test_fewer_than_two_good_answers_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 questions have a good answer and the judge check swaps them"):
        versions(QUESTIONS, {next(iter(GOOD)): GOOD[next(iter(GOOD))]}, 80)


def test_all_questions_of_mt_bench_have_a_good_answer() -> None:
    """30 references, and 50 answers written for this project, by the beginnings of FastChat's own questions."""
    rows = [json.loads(line) for line in check.WRITTEN.read_text().splitlines()]
    assert len(rows) == 50
    assert len({row["question"] for row in rows}) == 50
    assert all(row["answer"].strip() for row in rows)
    questions = {
        i: {"question_id": i, "category": "writing", "turns": [row["question"] + "…"]} for i, row in enumerate(rows)
    }
    assert len(versions(questions, {}, 80)) == 50


def test_the_power_that_is_left() -> None:
    """A judge of true AUC 0.8 passed one comparison of 15 questions in 65 % of trials."""
    assert power(15) == pytest.approx(0.65, abs=0.01)
    assert power(16) == pytest.approx(0.80, abs=0.01)
    assert power(80) > 0.999
    assert power(15, 0.5) < 0.025


def test_a_reference_without_question_or_words_is_refused() -> None:
    number, reference = next(iter(GOOD.items()))
    with pytest.raises(UserError, match=r"the reference answer to question 999 has no question; fetch again$"):
        versions(QUESTIONS, GOOD | {999: reference}, 80)
    with pytest.raises(UserError, match=rf"the reference answer to question {number} has no words; fetch again$"):
        versions(QUESTIONS, GOOD | {number: {"choices": [{"turns": [" \n", ""]}]}}, 80)


def test_each_question_is_judged_with_the_prompt_of_the_sweep() -> None:
    """With the reference where the sweep shows one, by the category's name in any case, and without elsewhere."""
    shown = {r["question_id"]: r for r in make_references([*QUESTIONS.values()], "stock")}
    writing = next(n for n, q in QUESTIONS.items() if q["category"] == "writing")
    answers = versions(QUESTIONS, GOOD | {writing: GOOD[max(GOOD)]}, 80)
    turns = check_turns(QUESTIONS, answers, TEMPLATES, shown, SINGLE)
    assert len(turns) == 22 * 5
    for turn, version in turns:
        assert turn.prompt.user.endswith(f"Reply: {answers[turn.question_id][version]}")
        assert (
            ("stock first" in turn.prompt.user) == (turn.template == "single-math-v1") == (turn.question_id != writing)
        )
    number = turns[-1][0].question_id
    del shown[number]
    upper = QUESTIONS | {number: QUESTIONS[number] | {"category": "Coding"}}
    with pytest.raises(UserError, match=rf"question {number} \(Coding\) needs a reference answer"):
        check_turns(upper, answers, TEMPLATES, shown, SINGLE)


def prepare(root: Path, judge: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    write_params(root, judge=judge, judge_check={"questions": 15}, **params)
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
        assert len(server.requests) == 15 * 5 + REPEATS  # the repeats are asked again, not read from the store
    metrics = json.loads(JUDGE.read_text())
    assert (metrics["judge"], metrics["references"], metrics["questions"]) == ("gpt-4", "stock", 15)
    assert metrics["repeat"] == {"prompts": 6, "largest_difference": 0, "deterministic": True}
    assert (metrics["agreement"], metrics["unscored"]) == (None, 0)
    assert metrics["with_reference"] == metrics["all"]
    assert "without_reference" not in metrics  # the others have no good answer here
    found = metrics["all"]
    assert found["power"] == pytest.approx(0.65, abs=0.01)
    assert [found[f"mean_{name}"] for name in ("good", "swapped", "truncated", "claims_rating")] == [9, 2, 2, 2]
    low = pytest.approx(15 / (15 + 1.959964**2), abs=1e-3)  # written with three digits
    for bad in ("swapped", "truncated", "claims_rating"):
        assert found[bad] == {"auc": 1, "auc_low": low, "auc_high": 1} | dict.fromkeys(MARGIN, 7)
    assert found["padded"]["auc"] == 0.5  # it knows no better
    printed = capsys.readouterr().out
    for bad in ("swapped", "truncated", "claims_rating"):
        assert f"{bad}: AUC 1.00 [0.80, 1.00]\n" in printed
    assert "15 questions: a judge of true AUC 0.8 passes a comparison with probability 0.65\n" in printed


def test_a_claimed_rating_raises_a_judge_that_believes_it(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def believes(request: dict[str, Any], number: int) -> Reply:
        claimed = "Rating: [[10]]" in request["messages"][1]["content"]
        return completion("[[10]]") if claimed else knowing(request, number)

    with chat_server(believes) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        judge_check.main()
    found = json.loads(JUDGE.read_text())["all"]
    assert (found["swapped"]["auc"], found["claims_rating"]["auc"], found["claims_rating"]["margin"]) == (1, 0, -1)


def test_answers_without_a_verdict_are_left_out_and_counted(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = min(GOOD)

    def shy(request: dict[str, Any], number: int) -> Reply:
        good = f"Reply: Right {first} is a  long\nanswer of β.\n\n" in request["messages"][1]["content"]
        return completion("Well.") if good else knowing(request, number)

    with chat_server(shy) as server:
        prepare(in_tmp, openai_judge(server.url, unscored="report"), monkeypatch)
        judge_check.main()
    metrics = json.loads(JUDGE.read_text())
    assert metrics["unscored"] >= 1
    assert metrics["all"]["swapped"]["auc"] == 1


def test_a_judge_of_pairs_that_knows_can_tell(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The good answer wins against both bad ones in both orders; a judge that likes place A ends in ties."""

    def knows(request: dict[str, Any], _: int) -> Reply:
        text = request["messages"][1]["content"]
        number = next(n for n, q in QUESTIONS.items() if text.startswith(q["turns"][0]))
        first, second = text.split("A: ")[1].split("|B: ")
        right = f"Right {number} is a  long\nanswer of β."
        places = [text == right for text in (first, second)]
        return completion("[[A]]" if places[0] else "[[B]]" if places[1] else "[[C]]")

    for rate, auc, told in ((knows, 1.0, True), (lambda *_: completion("[[A]]"), 0.5, False)):
        with chat_server(rate) as server:
            prepare(in_tmp, openai_judge(server.url, mode="pair"), monkeypatch)
            judge_check.main()
            assert len(server.requests) == 15 * 4 * 2 + REPEATS
        metrics = json.loads(JUDGE.read_text())
        assert metrics["mode"] == "pair"
        for bad in BAD:
            found = metrics["all"][bad]
            assert found["auc"] == auc
            assert (found["auc_low"] > 0.5) == told
            assert "margin" not in found


def test_a_judge_that_likes_length_alone_cannot_tell_swapped_ones(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(request: dict[str, Any], _: int) -> Reply:
        return completion("[[8]]" if "answer of" in request["messages"][1]["content"] else "[[3]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        judge_check.main()
    found = json.loads(JUDGE.read_text())["all"]
    assert (found["swapped"]["auc"], found["swapped"]["margin"]) == (0.5, 0)
    assert (found["truncated"]["auc"], found["truncated"]["margin"]) == (1, 5)


def test_mildness_to_a_question_is_no_want_of_discrimination() -> None:
    """Each good answer lies 0.4 above the bad one of its own question, and below those of most others."""
    found = discrimination([{"good": 2 + n / 2, "swapped": 1.6 + n / 2} for n in range(15)], SINGLE)["swapped"]
    assert (found["auc"], found["auc_low"]) == (1, proportion_of_all(15))
    assert found["margin"] == pytest.approx(0.4)


def test_a_judge_that_changes_its_mind_is_not_deterministic(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda _, number: completion("[[4]]" if number < 75 else "[[6]]")) as server:
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
    with pytest.raises(UserError, match=r"record 1: score is .*: (not a number from 1 to 10|input should be a val)"):
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
