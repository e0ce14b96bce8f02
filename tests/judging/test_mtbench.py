"""The mtbench stage: FastChat's own prompts and averages, and no turn without a score."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

import fastchat.llm_judge.common as fastchat
import pytest

from chat_server import ChatServer, Reply, chat_server, completion, error
from mtbench_data import (
    CATEGORIES,
    REFERENCED,
    TEMPLATES,
    local_judge,
    make_answers,
    make_questions,
    make_references,
    openai_judge,
    shown_by_fastchat,
    write_lines,
    write_params,
    write_questions,
)
from prefscan.common.errors import UserError
from prefscan.common.intervals import mean_interval
from prefscan.endpoints import chat_client
from prefscan.judging.judge import Verdict
from prefscan.judging.mtbench import NEED_REFERENCE, Judged, build_turns, scores
from prefscan.judging.openai import Replies
from prefscan.judging.pairs import MODE as PAIRS
from prefscan.judging.single import MODE as SINGLE
from prefscan.stages import mtbench

KEY = "sk-never-written-anywhere"


def by_id(rows: list[dict[str, Any]]) -> dict[int, Any]:
    return {row["question_id"]: row for row in rows}


QUESTIONS = by_id(make_questions(1))
ANSWERS = make_answers([*QUESTIONS.values()])
OTHERS = make_answers([*QUESTIONS.values()], "ipo-0.1-16")
REFERENCES = by_id(make_references([*QUESTIONS.values()], "stock"))


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_fastchats(category: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def record(model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        asked.append((conversation.to_openai_api_messages(), temperature))
        return "Rating: [[5]]"

    monkeypatch.setattr(fastchat, "chat_completion_openai", record)
    (question,) = (q for q in QUESTIONS.values() if q["category"] == category)
    (answer,) = (a for a in ANSWERS if a["question_id"] == question["question_id"])
    needs_reference = category in fastchat.NEED_REF_CATS
    turns = build_turns(QUESTIONS, [answer], TEMPLATES, REFERENCES, SINGLE)
    assert [turn.turn for turn in turns] == [1, 2]
    for turn in turns:
        name = ("single-math-v1" if needs_reference else "single-v1") + ("-multi-turn" if turn.turn == 2 else "")
        judge = fastchat.Judge("gpt-4", TEMPLATES[name], ref_based=needs_reference, multi_turn=turn.turn == 2)
        reference = REFERENCES[question["question_id"]] if needs_reference else None
        rating, user_prompt, _ = fastchat.run_judge_single(question, answer, judge, reference, turn.turn == 2)
        messages, temperature = asked.pop()
        assert rating == 5
        assert turn.prompt.user == user_prompt
        assert messages == [
            {"role": "system", "content": turn.prompt.system},
            {"role": "user", "content": turn.prompt.user},
        ]
        assert temperature == 0
        assert (turn.template, turn.category, turn.question_id) == (name, category, question["question_id"])
        assert ("stock" in turn.prompt.user) == needs_reference


def test_the_categories_with_references_are_fastchats() -> None:
    assert {c for c in CATEGORIES if c in fastchat.NEED_REF_CATS} == NEED_REFERENCE == set(REFERENCED)


def test_a_missing_reference_is_refused() -> None:
    (lost,) = (q["question_id"] for q in QUESTIONS.values() if q["category"] == "math")
    references = {key: value for key, value in REFERENCES.items() if key != lost}
    with pytest.raises(UserError, match=rf"question {lost} \(math\) needs a reference .* stock and corrected"):
        build_turns(QUESTIONS, ANSWERS, TEMPLATES, references, SINGLE)


def test_an_answer_to_an_unknown_question_is_refused() -> None:
    with pytest.raises(UserError, match=r"question 999 was answered but is not in question\.jsonl; answer again"):
        build_turns(QUESTIONS, [ANSWERS[0] | {"question_id": 999}], TEMPLATES, REFERENCES, SINGLE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"^judge_prompts\.jsonl has no single-v1; fetch FastChat's again$"),
        ("{nobody}", r"template single-v1 cannot be filled in \(KeyError: 'nobody'\); it may name answer, answer_1"),
        ("{", r"the template single-v1 cannot be filled in \(ValueError: "),
        ("{answer.nothing}", r"the template single-v1 cannot be filled in \(AttributeError: "),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(template: str | None, message: str) -> None:
    templates = {name: value for name, value in TEMPLATES.items() if name != "single-v1"}
    if template is not None:
        templates["single-v1"] = TEMPLATES["single-v1"] | {"prompt_template": template}
    with pytest.raises(UserError, match=message):
        build_turns(QUESTIONS, ANSWERS, templates, REFERENCES, SINGLE)


def judgements_of(model: str, ratings: list[float]) -> list[dict[str, Any]]:
    """Judgements with these ratings in turn, two a question."""
    return [
        {"question_id": 81 + i // 2, "model": model, "score": rating, "turn": 1 + i % 2, "tstamp": 0.0}
        for i, rating in enumerate(ratings)
    ]


def test_scores_are_what_show_result_prints(tmp_path: Path) -> None:
    ratings = {
        "base": [7, 5.5, 1, 10, 3.25, 3, 9, 9],
        "ipo-0.1-8": [1.0, 2.0, 3.5, 4.123456, 5.0, 6.7, 2.0, 8.0],
    }
    rows = [row for model, values in ratings.items() for row in judgements_of(model, values)]
    write_lines(tmp_path / "gpt-4_single.jsonl", rows)
    shown = shown_by_fastchat("--input-file", tmp_path / "gpt-4_single.jsonl")
    for model, values in ratings.items():
        measured = scores(Judged(judgements_of(model, values), {81 + i: "writing" for i in range(4)}, []), SINGLE)
        for name, section in zip(("first_turn", "second_turn", "average"), shown, strict=True):
            digits = len(section[model].split(".")[1])
            assert f"{measured[name]:.{digits}f}" == section[model]


TOPICS = {81: "math", 82: "coding", 83: "math", 84: "coding"}


@pytest.mark.parametrize(
    ("mode", "low", "high", "ends"),
    [("pair", 0.0, 1.0, (None, 1.0)), ("pair", 1.0, 0.0, (0.0, None)), ("single", 1.0, 10.0, (1.0, 10.0))],
)
def test_an_interval_ends_where_the_scale_ends(
    mode: str, low: float, high: float, ends: tuple[float | None, float | None]
) -> None:
    """A model that wins on all questions but one, one that loses on all but one, and one of extremes."""
    each = [low, high, low, high] if mode == "single" else [high, high, high, (low + high) / 2]
    measured = scores(
        Judged(judgements_of("base", [score for score in each for _ in range(2)]), TOPICS, []),
        SINGLE if mode == "single" else PAIRS,
    )
    _, student_low, student_high = mean_interval(each)
    expected = (student_low if ends[0] is None else ends[0], student_high if ends[1] is None else ends[1])
    assert (measured["average_low"], measured["average_high"]) == expected
    assert student_low < measured["average_low"] or student_high > measured["average_high"]


def test_scores_by_question_and_category() -> None:
    ratings = [7, 5, 1, 10, 3, 4, 9, 8]
    measured = scores(Judged(judgements_of("base", ratings), TOPICS, []), SINGLE)
    assert measured["categories"] == {"coding": fmean([1, 10, 9, 8]), "math": fmean([7, 5, 3, 4])}
    assert measured["questions"] == {"81": 6, "82": 5.5, "83": 3.5, "84": 8.5}
    # A question is one observation: with its turns as two, the interval would be narrower.
    mean, low, high = mean_interval([6, 5.5, 3.5, 8.5])
    assert (measured["average"], measured["average_low"], measured["average_high"]) == (mean, low, high)


def prepare(root: Path, judge: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0)
    write_params(root, judge=judge)
    write_questions(root, [*QUESTIONS.values()])
    write_lines(root / "data/mt_bench/model_answer/base.jsonl", ANSWERS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


JUDGEMENTS = Path("data/mt_bench/model_judgment/cells/base.jsonl")
METRICS = Path("metrics/mtbench/base.json")


@pytest.mark.parametrize("references", ["stock", "corrected"])
def test_main_with_a_server(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, references: str) -> None:
    def rate(request: dict[str, Any], _: int) -> Reply:
        return completion(f"Fine. Rating: [[{len(request['messages'][1]['content']) % 10 + 1}]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url, references=references), monkeypatch)
        mtbench.main("base")
        assert len(server.requests) == 16
    judgements = read_lines(JUDGEMENTS)
    keys = [
        "question_id",
        "model",
        "judge",
        "user_prompt",
        "judgment",
        "score",
        "turn",
        "sample",
        "served_by",
        "tstamp",
    ]
    assert [list(row) for row in judgements] == [keys] * 16
    assert [(row["question_id"], row["turn"]) for row in judgements] == [(81 + i // 2, 1 + i % 2) for i in range(16)]
    for row in judgements:
        assert row["score"] == len(row["user_prompt"]) % 10 + 1
        assert row["judgment"] == f"Fine. Rating: [[{int(row['score'])}]]"
        assert row["model"] == "base"
        assert row["judge"][0] == "gpt-4"
        assert row["judge"][1] in TEMPLATES
    assert sum(f"{references} first" in row["user_prompt"] for row in judgements) == 6
    metrics = json.loads(METRICS.read_text())
    assert metrics["average"] == fmean(row["score"] for row in judgements)
    assert metrics["judge"] == "gpt-4"
    assert metrics["references"] == references
    assert metrics["served_by"] == ["m"]
    assert metrics["sample_sd"] is None
    assert set(metrics["categories"]) == set(CATEGORIES)


def test_main_with_a_local_judge_twice_is_the_same_bytes(
    in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(in_tmp, local_judge(tiny_model), monkeypatch)
    mtbench.main("base")
    first = JUDGEMENTS.read_bytes(), METRICS.read_bytes()
    mtbench.main("base")
    assert (JUDGEMENTS.read_bytes(), METRICS.read_bytes()) == first
    assert len({row["score"] for row in read_lines(JUDGEMENTS)}) == 16
    assert not Path(".prefscan/judgements").exists()


def test_samples_are_judged_and_kept_apart(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples a turn: as many requests, records and stored replies; FastChat prints our average over all."""
    with chat_server(lambda _, number: completion(f"[[{number % 9 + 1}]]")) as server:
        prepare(in_tmp, openai_judge(server.url, samples=3, concurrency=1), monkeypatch)
        mtbench.main("base")
        assert len(server.requests) == 48
        first = JUDGEMENTS.read_bytes()
        mtbench.main("base")
        assert len(server.requests) == 48
        assert JUDGEMENTS.read_bytes() == first
    judgements = read_lines(JUDGEMENTS)
    assert [row["sample"] for row in judgements] == [0, 1, 2] * 16
    groups = [[row["score"] for row in judgements[i : i + 3]] for i in range(0, 48, 3)]
    assert groups[0] == [1, 2, 3]
    metrics = json.loads(METRICS.read_text())
    assert metrics["sample_sd"] == pytest.approx(1.0)  # of n, n + 1, n + 2 in every group
    assert all(max(group) - min(group) == 2 for group in groups)
    assert metrics["average"] == pytest.approx(fmean(row["score"] for row in judgements))
    assert metrics["questions"]["81"] == fmean(groups[0] + groups[1])
    shown = shown_by_fastchat("--input-file", JUDGEMENTS)
    for name, section in zip(("first_turn", "second_turn", "average"), shown, strict=True):
        assert f"{metrics[name]:.{len(section['base'].split('.')[1])}f}" == section["base"]


def test_a_killed_stage_asks_for_no_kept_reply_again(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 while the server holds back the ninth reply: what had arrived and was stored is not asked again."""
    held, release = Event(), Event()

    def rate(_: dict[str, Any], number: int) -> Reply:
        if number == 8:
            held.set()
            release.wait(60)
        return completion("[[5]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url, concurrency=1), monkeypatch)
        source = str(Path(mtbench.__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-m", "prefscan", "mtbench", "base"], env=os.environ | {"PYTHONPATH": source}
        )
        try:
            assert held.wait(60)
        finally:
            process.kill()
            process.wait()
            release.set()
        assert len(list(Path(".prefscan/judgements").glob("*.json"))) == 8
        before = [request["messages"] for request in server.requests[:8]]
        server.requests.clear()
        mtbench.main("base")
        assert len(server.requests) == 8
        assert not [request for request in server.requests if request["messages"] in before]
    assert len(read_lines(JUDGEMENTS)) == 16


def test_what_served_a_judge_is_listed_in_order(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(_: dict[str, Any], number: int) -> Reply:
        served = {"system_fingerprint": f"fp_{9 - number % 5}"}
        return Reply(body=json.dumps(json.loads(completion("[[7]]").body) | served).encode())

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        mtbench.main("base")
    assert json.loads(METRICS.read_text())["served_by"] == [f"m fp_{i}" for i in range(5, 10)]


@pytest.mark.parametrize("key", ["nothing-0.1-16", "../base"])
def test_a_model_that_is_no_cell_is_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    with pytest.raises(UserError, match=f"^cell '{re.escape(key)}' is not in the grid; its cells are "):
        mtbench.main(key)


def test_unscored_turns_fail_the_cell_and_only_they_are_asked_again(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way to fail once: no rating, a wrong one, a refusal, a server error; then a run with a healthy server.

    Replies without a rating were paid for and stay, until they are deleted.
    """
    faults = {
        ("writing", 1): (completion("I would rather not."), "no rating"),
        ("math", 2): (completion("[[11]]"), "rating '11' is not a number from 1 to 10"),
        ("stem", 1): (error(400), "the server answered 400"),
        ("coding", 2): (error(500), "the server answered 500"),
    }
    healthy = False
    turns = {turn.prompt.user: turn for turn in build_turns(QUESTIONS, ANSWERS, TEMPLATES, REFERENCES, SINGLE)}

    def rate(request: dict[str, Any], _: int) -> Reply:
        turn = turns[request["messages"][1]["content"]]
        fault = faults.get((turn.category, turn.turn))
        return fault[0] if fault and not healthy else completion(f"[[{turn.question_id - 80}]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        with pytest.raises(UserError, match=r"4 of 16 turns have no score .*`dvc repro` again") as failure:
            mtbench.main("base")
        for (category, number), (_, reason) in faults.items():
            (question_id,) = (q["question_id"] for q in QUESTIONS.values() if q["category"] == category)
            assert f"question {question_id} turn {number}: {reason}" in str(failure.value)
        assert len(server.requests) == 16 + 2 + 2  # the server error was tried three times, two turns got a reminder
        assert not JUDGEMENTS.exists()
        assert not METRICS.exists()
        assert len(list(Path(".prefscan/judgements").glob("*.json"))) == 16  # two of two turns

        healthy = True
        server.requests.clear()
        with pytest.raises(UserError, match=r"2 of 16 turns have no score .*delete a kept reply") as failure:
            mtbench.main("base")
        asked = Counter(turns[r["messages"][1]["content"]] for r in server.requests)
        assert {(turn.category, turn.turn): count for turn, count in asked.items()} == {
            ("stem", 1): 1,
            ("coding", 2): 1,
        }
        kept = re.findall(r"kept in (\S+\.json)", str(failure.value))
        assert len(kept) == 2
        for path in kept:
            Path(path).unlink()
        server.requests.clear()
        mtbench.main("base")
        assert len(server.requests) == 2
        judgements = read_lines(JUDGEMENTS)
        assert [row["score"] for row in judgements] == [row["question_id"] - 80 for row in judgements]
        assert len(judgements) == 16

        # All are paid for: neither the server nor the key is needed.
        server.requests.clear()
        monkeypatch.delenv("PREFSCAN_TEST_KEY")
        first = JUDGEMENTS.read_bytes()
        mtbench.main("base")
        assert server.requests == []
        assert JUDGEMENTS.read_bytes() == first


def test_a_failure_names_five_turns_and_the_number_of_all(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda *_: completion("no")) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        with pytest.raises(UserError, match=r"^16 of 16 turns have no score") as failure:
            mtbench.main("base")
    assert str(failure.value).count("question ") == 5
    assert "; …)" in str(failure.value)


def test_a_verdict_that_cannot_be_kept_stops_the_asking(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the prompts still waiting would be paid for and lost."""
    kept = Event()

    def rate(_: dict[str, Any], number: int) -> Reply:
        if number >= 2:
            kept.wait()
        return completion("[[5]]")

    def refuse(*_: Any) -> None:
        kept.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Replies, "put", refuse)
    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url), monkeypatch)
        with pytest.raises(OSError, match="No space"):
            mtbench.main("base")
        for thread in threading.enumerate():
            if "ThreadPoolExecutor" in thread.name:
                thread.join(2)
        assert len(server.requests) < 16


def test_the_key_is_written_nowhere(
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")

    def refuse(_: dict[str, Any], number: int) -> Reply:
        # OpenAI's own message for a wrong key repeats a part of it; a careless server might repeat all.
        return error(401, f"Incorrect API key provided: {KEY}") if number % 2 else completion("[[4]]")

    served: ChatServer
    with chat_server(refuse) as served:
        prepare(in_tmp, openai_judge(served.url), monkeypatch)
        with pytest.raises(UserError) as failure:
            mtbench.main("base")
    assert set(served.keys) == {f"Bearer {KEY}"}
    assert "AuthenticationError" in str(failure.value)
    printed = capfd.readouterr()
    texts = [str(failure.value), caplog.text, printed.out, printed.err]
    texts += [path.read_text() for path in in_tmp.rglob("*") if path.is_file()]
    assert len(texts) > 12
    assert "/chat/completions" in caplog.text  # the client does log what it sends
    assert not [text for text in texts if KEY in text]


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_of_pairs_are_fastchats(category: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastChat's own match between two models, with its judgement of both orders."""
    asked: list[Any] = []

    def record(model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        asked.append(conversation.to_openai_api_messages())
        return "[[A]]"

    monkeypatch.setattr(fastchat, "chat_completion_openai", record)
    (question,) = (q for q in QUESTIONS.values() if q["category"] == category)
    number = question["question_id"]
    (answer,), (other,) = ([a for a in rows if a["question_id"] == number] for rows in (ANSWERS, OTHERS))
    reference = REFERENCES.get(number)
    turns = build_turns(QUESTIONS, [answer], TEMPLATES, REFERENCES, PAIRS, {number: other})
    assert [turn.turn for turn in turns] == [1, 1, 2, 2]
    for turn in turns[::2]:
        judge = fastchat.Judge("gpt-4", TEMPLATES[turn.template], reference is not None, multi_turn=turn.turn == 2)
        match = fastchat.MatchPair(question, "base", "other", answer, other, judge, reference, turn.turn == 2)
        result = fastchat.play_a_match_pair(match, output_file="")
        both = [t for t in turns if t.turn == turn.turn]
        assert [t.prompt.user for t in both] == [result["g1_user_prompt"], result["g2_user_prompt"]]
        assert asked.pop()[0] == {"role": "system", "content": both[1].prompt.system}
        row = PAIRS.record("base", "other", "gpt-4", both, [Verdict(1.0, "[[A]]"), Verdict(1.0, "[[A]]")])
        assert {name: row[name] for name in result if name not in ("judge", "tstamp")} == {
            name: value for name, value in result.items() if name not in ("judge", "tstamp")
        }
        assert tuple(row["judge"]) == result["judge"]


def test_a_pair_without_the_other_answer_is_refused() -> None:
    with pytest.raises(UserError, match=r"question 81 was not answered by judge\.against"):
        build_turns(QUESTIONS, ANSWERS, TEMPLATES, REFERENCES, PAIRS, {})


@pytest.mark.parametrize("samples", [1, 2])
def test_pairs_are_what_show_result_prints(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """A judge with a liking for place A on some questions: wins, losses and ties of all kinds."""
    letters = {}

    def rate(request: dict[str, Any], _: int) -> Reply:
        text = request["messages"][1]["content"]
        letters[text] = "ABCAAB"[zlib.crc32(text.encode()) % 6]
        return completion(f"[[{letters[text]}]]")

    with chat_server(rate) as server:
        prepare(in_tmp, openai_judge(server.url, mode="pair", against="ipo-0.1-16", samples=samples), monkeypatch)
        write_lines(in_tmp / "data/mt_bench/model_answer/ipo-0.1-16.jsonl", OTHERS)
        mtbench.main("base")
        assert len(server.requests) == 32 * samples
        rows, metrics = read_lines(JUDGEMENTS), json.loads(METRICS.read_text())
        assert len(rows) == 16 * samples
        mtbench.main("ipo-0.1-16")
        assert len(server.requests) == 32 * samples  # nobody is asked about an answer beside itself
    itself = json.loads(METRICS.with_name("ipo-0.1-16.json").read_text())
    assert (itself["average"], itself["average_low"], itself["average_high"]) == (0.5, 0.5, 0.5)
    assert METRICS.with_name("ipo-0.1-16.json").exists()
    assert read_lines(JUDGEMENTS.with_name("ipo-0.1-16.jsonl")) == []

    options = ["--mode", "pairwise-baseline", "--baseline-model", "ipo-0.1-16", "--input-file", str(JUDGEMENTS)]
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    shown = next(line.split() for line in printed.splitlines() if line.startswith("base"))
    turns = 16 * samples
    expected = [metrics["wins"], metrics["losses"], metrics["ties"]]
    assert [int(value) for value in shown[1:4]] == expected
    assert min(expected) > 0
    assert sum(expected) == turns
    for value, rate_of in zip(shown[4:], (expected[0] / turns, expected[1] / turns, metrics["average"]), strict=True):
        digits = len(value.split(".")[1])
        assert value == f"{rate_of:.{digits}f}"
    by_hand = [letters[row["g1_user_prompt"]] == "A" and letters[row["g2_user_prompt"]] == "B" for row in rows]
    assert sum(by_hand) == metrics["wins"]
    same = [letters[r["g1_user_prompt"]] + letters[r["g2_user_prompt"]] in ("AB", "BA", "CC") for r in rows]
    assert metrics["orders_agree"] == fmean(same)
    assert (metrics["mode"], metrics["against"]) == ("pair", "ipo-0.1-16")
