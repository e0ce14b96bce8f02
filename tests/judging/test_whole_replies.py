"""A reply is a verdict only if it is whole: the case of each way in which a server sends less, or more, than one."""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_server import Reply, chat_server, completion
from mtbench_data import openai_judge
from prefscan.common.config import OpenAIJudge
from prefscan.endpoints import chat_client
from prefscan.judging.judge import Prompt, Verdict, load_judge

PRICES = {"input": 10.0, "output": 100.0}
LEDGER = Path(".prefscan/judgements/spending.jsonl")


@pytest.fixture(autouse=True)
def at_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0)


def changed(content: Any, finish: str | None = "stop", usage: Any = None, **message: Any) -> Reply:
    """A completion with another finish, usage, or further fields of its message."""
    body = json.loads(completion(content).body)
    choice = body["choices"][0]
    choice["message"] |= message
    choice["finish_reason"] = finish
    return Reply(body=json.dumps(body | ({"usage": usage} if usage else {})).encode())


def judged(replies: list[Reply], prompts: int = 1, **changes: Any) -> tuple[dict[int, Verdict], int]:
    """The verdicts when the server sends these replies in turn, the last one again and again; requests that it got."""
    with chat_server(lambda _, number: replies[min(number, len(replies) - 1)]) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url, **changes))
        verdicts = dict(load_judge(settings).verdicts(Prompt("s", f"Judge {i}.") for i in range(prompts)))
        return verdicts, len(server.requests)


def booked() -> float:
    return sum(json.loads(line)["usd"] for line in LEDGER.read_text().splitlines())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (changed("It says [[5]], and", "length"), "cut at judge.max_tokens (64); raise it"),
        (
            changed("[[10]]", "content_filter", refusal="I cannot\nsay."),
            "ended the reply with 'content_filter': I cannot say.",
        ),
        (changed("[[10]]", "stop", refusal="I will not."), "ended the reply with 'stop': I will not."),
        (changed("[[10]]", "tool_calls"), "ended the reply with 'tool_calls'"),
        (changed("[[10]]", None), "gave no finish_reason"),
    ],
    ids=["cut", "filtered", "refused", "another finish", "no finish"],
)
@pytest.mark.parametrize("mode", ["single", "pair"])
def test_a_reply_that_is_not_whole_has_no_verdict_and_no_reminder(reply: Reply, reason: str, mode: str) -> None:
    verdicts, requests = judged([reply], mode=mode)
    assert verdicts[0].score is None
    assert reason in verdicts[0].reason
    assert "kept in .prefscan/judgements/" in verdicts[0].reason
    assert requests == 1


@pytest.mark.parametrize(
    ("text", "mode", "score"),
    [
        ("<think>Maybe [[5]].</think> Rating: [[9]]", "single", 9),
        ("Maybe [[5]], no.</think>\nRating: [[9]]", "single", 9),  # the template opened it in the prompt
        ("<think>[[B]]? </think>[[A]]", "pair", 1),
    ],
)
def test_thinking_is_not_the_verdict(text: str, mode: str, score: float) -> None:
    verdicts, requests = judged([completion(text)], mode=mode)
    assert (verdicts[0].score, verdicts[0].text, requests) == (score, text, 1)


def test_thinking_without_end_says_nothing() -> None:
    verdicts, requests = judged([completion("<think>[[5]] perhaps"), completion("[[4]]")])
    assert (verdicts[0].score, requests) == (4, 2)


def test_a_model_that_thinks_until_the_limit_stops_the_stage() -> None:
    """Three requests of 32: one at a time until a reply can be used, and no reminders."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 64, "total_tokens": 1064}
    reply = changed("", "length", usage, reasoning_content="Hm, [[7]]…")
    verdicts, requests = judged([reply], prompts=16, concurrency=16, prices=PRICES)
    assert requests == 3
    assert booked() == pytest.approx(3 * (0.01 + 0.0064))
    reasons = [verdict.reason for verdict in verdicts.values()]
    assert all(verdict.score is None for verdict in verdicts.values())
    assert (
        sum("judge.max_tokens (64) was used up by reasoning before any verdict" in reason for reason in reasons) == 16
    )
    assert sum(reason.startswith("not asked after this") for reason in reasons) == 13


def test_one_that_thinks_too_long_stops_nothing() -> None:
    replies = [completion("[[3]]"), changed("", "length"), completion("[[4]]")]
    verdicts, requests = judged(replies, prompts=6, concurrency=1)
    assert [verdict.score for _, verdict in sorted(verdicts.items())] == [3, None, 4, 4, 4, 4]
    assert requests == 6


def test_an_empty_reply_is_not_sent_back() -> None:
    """Many servers refuse an empty turn of the assistant, which a kept reply would have brought at every rerun."""

    def strict(request: dict[str, Any], number: int) -> Reply:
        if any(not message["content"] for message in request["messages"]):
            return Reply(400, b'{"detail": "empty message"}')
        return completion("" if number == 0 else "[[8]]")

    with chat_server(strict) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
        assert verdict.score == 8
        first, second = server.requests
        assert [message["role"] for message in second["messages"]] == ["system", "user"]
        assert second["messages"][1]["content"].startswith("u\n\nYour reply has no rating")
        assert len(first["messages"]) == 2


def test_the_kept_reply_is_named_where_the_reminder_is_refused() -> None:
    verdicts, requests = judged([completion("Well."), Reply(400, b'{"detail": "too long"}')])
    kept = next(Path(".prefscan/judgements").glob("*.json"))
    assert verdicts[0].reason == (
        "the server answered 400 (BadRequestError: too long), asked again after no rating of the form [[n]] in the "
        f"reply, kept in {kept}"
    )
    assert requests == 2


def in_200(error: Any, **body: Any) -> Reply:
    return Reply(body=json.dumps({"error": error} | body).encode())


@pytest.mark.parametrize(
    ("error", "requests", "words"),
    [
        ({"code": 502, "message": "upstream broke"}, 2, ""),
        ({"code": 429, "message": "slow down"}, 2, ""),
        ({"code": "rate_limit_exceeded", "message": "slow"}, 2, ""),
        ({"type": "overloaded_error", "message": "busy"}, 2, ""),
        ({"code": 400, "message": "bad prompt"}, 1, "the server answered 200 with an error (400: bad prompt)"),
        ({"code": "content_policy", "message": "no"}, 1, "the server answered 200 with an error (content_policy: no)"),
        ("just words", 1, "the server answered 200 with an error (just words)"),
    ],
    ids=str,
)
def test_an_error_inside_a_200_counts_by_its_code(error: Any, requests: int, words: str) -> None:
    verdicts, asked = judged([in_200(error), completion("[[6]]")], prices=PRICES)
    assert asked == requests
    assert verdicts[0].score == (6 if requests == 2 else None)
    assert words in verdicts[0].reason
    if requests == 1:
        assert not LEDGER.exists()  # what was refused costs nothing


def test_an_error_inside_a_choice_is_an_error_and_its_tokens_are_billed() -> None:
    body = json.loads(changed("[[9", "error").body)
    body["choices"][0]["error"] = {"code": 502, "message": "upstream broke"}
    body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    verdicts, requests = judged([Reply(body=json.dumps(body).encode()), completion("[[6]]")], prices=PRICES)
    assert (verdicts[0].score, requests) == (6, 2)
    assert booked() > 0.011


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"detail": "max_tokens is too\\n large"}', "max_tokens is too large"),
        (b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        (b'{"message": "no such field"}', "no such field"),
        (b'{"error": "words"}', "words"),
        (b'{"errors": [{"title": "wrong"}]}', "wrong"),
        (b'{"error": {"message": {"reason": "deep"}}}', "deep"),
        (b'{"odd": 1}', '{"odd": 1}'),
        (b"plain words", "plain words"),
    ],
)
def test_the_words_of_an_error_of_any_shape_are_shown(body: bytes, words: str) -> None:
    kind = "application/json" if body[:1] in b"{[" else "text/plain"
    verdicts, _ = judged([Reply(422, body, kind)])
    assert verdicts[0].reason == f"the server answered 422 (UnprocessableEntityError: {words})"


def test_a_truncated_prompt_stops_the_stage_and_is_not_kept() -> None:
    """Of a prompt of 8,000 bytes of English, 100 tokens are not all."""
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    text = "The quick brown fox jumps over the lazy dog. " * 180
    with chat_server(lambda *_: changed("[[7]]", usage=usage)) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        verdicts = dict(load_judge(settings).verdicts(Prompt("s", f"{i} {text}") for i in range(9)))
        assert len(server.requests) == 1
    assert all("the server counted 100 tokens in a prompt" in verdict.reason for verdict in verdicts.values())
    assert not list(Path(".prefscan/judgements").glob("*.json"))
