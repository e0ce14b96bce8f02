"""The OpenAI-compatible judge, through the real client, against a server on the loopback interface."""

import itertools
import json
from typing import Any

import pytest

import prefscan.judges.openai
from chat_server import Reply, chat_server, completion, error
from mtbench_data import openai_judge
from prefscan.errors import UserError
from prefscan.judges import Prompt, load_judge
from prefscan.judges.openai import parse_rating
from prefscan.params import OpenAIJudge

KEY = "sk-test"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]], with hesitation", 7.5),
        ("[[10]]", 10),
        ("[[1]]", 1),
        ("[[10.0]]", 10),
        ("First [[7]]; so, Rating: [[7]]", 7),
        ("a [list] of [things], then [[3]]", 3),
    ],
)
def test_a_rating_is_read(text: str, score: float) -> None:
    verdict = parse_rating(text)
    assert (verdict.score, verdict.text, verdict.reason) == (score, text, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Rating: 7", "no rating of the form [[n]] in the reply"),
        ("Rating: [7]", "no rating of the form [[n]] in the reply"),
        ("", "no rating of the form [[n]] in the reply"),
        ("[[7]] and [[3]]", "2 different ratings of the form [[n]] in the reply"),
        ("[[7]] and [[7.0]] and [[A]]", "3 different ratings of the form [[n]] in the reply"),
        *(
            (f"Rating: [[{rating}]]", f"rating {rating!r} is no number from 1 to 10")
            for rating in (
                "0",
                "11",
                "0.9",
                "10.1",
                "8/10",
                "-1",
                " 7 ",
                "1e1",
                "nan",
                "inf",
                "7.",
                "",
                "rating",
                "7,5",
            )
        ),
    ],
)
def test_a_doubtful_rating_is_refused(text: str, reason: str) -> None:
    verdict = parse_rating(text)
    assert (verdict.score, verdict.text, verdict.reason) == (None, text, reason)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and no waiting between attempts."""
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    monkeypatch.setattr(prefscan.judges.openai, "wait_random_exponential", lambda **_: lambda _: 0)


def ask(replies: list[Reply], **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The verdict on one prompt when the server sends these replies in turn, and the requests that it got."""
    with chat_server(lambda _, number: replies[number]) as server:
        judge = load_judge(OpenAIJudge.model_validate(openai_judge(server.url, **changes)))
        ((place, verdict),) = judge.verdicts([Prompt("You judge.", "Judge this.")])
        assert place == 0
        assert set(server.keys) == {f"Bearer {KEY}"}
        return verdict, server.requests


GOOD = completion("Rating: [[6]]")


def test_the_request() -> None:
    _, (request,) = ask([GOOD])
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "gpt-4"
    assert request["messages"] == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "Judge this."},
    ]
    assert (request["temperature"], request["max_tokens"]) == (0, 64)


@pytest.mark.parametrize(
    "passing",
    [error(429), error(500), error(503), Reply(fault="closes"), Reply(fault="hangs")],
    ids=["rate limit", "server error", "overloaded", "closed connection", "time-out"],
)
def test_a_passing_fault_is_tried_again(passing: Reply) -> None:
    verdict, requests = ask([passing, GOOD], timeout=2.0)
    assert (verdict.score, verdict.text) == (6, "Rating: [[6]]")
    assert len(requests) == 2
    assert requests[0] == requests[1]


@pytest.mark.parametrize(
    ("replies", "reason", "count"),
    [
        ([error(500)] * 4, "the server answered 500 (InternalServerError)", 4),
        ([error(429)] * 4, "the server answered 429 (RateLimitError)", 4),
        ([Reply(fault="closes")] * 4, "the request failed 4 times (APIConnectionError)", 4),
        ([error(500), error(429), Reply(fault="closes"), error(502)], "the server answered 502", 4),
        ([error(401)], "the server answered 401 (AuthenticationError)", 1),
        ([error(400)], "the server answered 400 (BadRequestError)", 1),
        ([error(404)], "the server answered 404 (NotFoundError)", 1),
        ([error(429), error(401)], "the server answered 401", 2),
        ([Reply(body=b'{"choices": [{"mess')], "the server sent no chat completion", 1),
        ([Reply(body=b"")], "the server sent no chat completion", 1),
        ([Reply(body=b"<html>Welcome</html>", content_type="text/html")], "the server sent no chat completion", 1),
        ([Reply(body=b"[]")], "the server sent no chat completion", 1),
        ([Reply(body=b"null")], "the server sent no chat completion", 1),
        ([Reply(body=b'{"choices": []}')], "the server sent an empty reply", 1),
        ([Reply(body=b'{"choices": [{"message": null}]}')], "the server sent an empty reply", 1),
        ([completion("")], "the server sent an empty reply", 1),
        ([completion(None)], "the server sent an empty reply", 1),
        ([completion("Rating: [[12]]")], "rating '12' is no number from 1 to 10", 1),
    ],
)
def test_a_fault_is_a_verdict_without_score(replies: list[Reply], reason: str, count: int) -> None:
    verdict, requests = ask(replies, attempts=4)
    assert verdict.score is None
    assert reason in verdict.reason
    assert len(requests) == count


@pytest.mark.parametrize("concurrency", [1, 4])
def test_every_prompt_gets_its_own_verdict(concurrency: int) -> None:
    """A fault of one prompt leaves the others; each verdict comes with the place of its prompt."""

    def rate(request: dict[str, Any], _: int) -> Reply:
        number = int(request["messages"][1]["content"])
        return Reply(body=b"oops") if number == 5 else completion(f"[[{number}]]")

    with chat_server(rate) as server:
        judge = load_judge(OpenAIJudge.model_validate(openai_judge(server.url, concurrency=concurrency)))
        verdicts = dict(judge.verdicts(Prompt("", str(n)) for n in range(1, 11)))
    assert {place: verdict.score for place, verdict in verdicts.items()} == {
        n - 1: None if n == 5 else n for n in range(1, 11)
    }
    assert len(server.requests) == 10


def test_a_caller_that_stops_pays_for_no_more_prompts() -> None:
    """When a verdict cannot be kept, say for want of disk space, the prompts still waiting are not asked."""
    with chat_server(lambda *_: GOOD) as server:
        judge = load_judge(OpenAIJudge.model_validate(openai_judge(server.url, concurrency=2)))
        verdicts: Any = judge.verdicts([Prompt("", str(n)) for n in range(200)])
        assert next(verdicts)[1].score == 6
        verdicts.close()
        assert len(server.requests) < 200


@pytest.mark.parametrize("key", [None, ""])
def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("PREFSCAN_TEST_KEY")
    if key is not None:
        monkeypatch.setenv("PREFSCAN_TEST_KEY", key)
    with pytest.raises(UserError, match=r"^judge\.key_variable: .* no PREFSCAN_TEST_KEY; export it, or .*judge=local"):
        load_judge(OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1")))


@pytest.mark.parametrize("key", ["“sk-quoted”", "sk-line\r", "sk line\n"])
def test_a_key_that_no_request_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", key)
    with pytest.raises(
        UserError, match=r"^judge\.key_variable: PREFSCAN_TEST_KEY holds .*; export it again"
    ) as failure:
        load_judge(OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1")))
    assert "sk" not in str(failure.value)


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real waits: random, so that parallel requests do not return together, and growing with the attempts."""
    monkeypatch.undo()
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    for _ in range(20):
        ask([error(429)] * 8, attempts=8)
    by_attempt = [waits[i::7] for i in range(7)]
    longest = [max(group) for group in by_attempt]
    assert all(late > early for early, late in itertools.pairwise(longest))
    assert all(len(set(group)) == 20 for group in by_attempt)
    assert max(waits) <= 60


def test_the_server_may_send_more_than_openai_does() -> None:
    """vLLM and others add fields of their own."""
    body = json.loads(completion("[[2]]").body) | {"prompt_logprobs": None, "extra": {"a": [1]}}
    verdict, _ = ask([Reply(body=json.dumps(body).encode())])
    assert verdict.score == 2
