"""The OpenAI-compatible judge, through the real client, against a server on the loopback interface."""

import itertools
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_server import Reply, chat_server, completion, error
from mtbench_data import openai_judge
from prefscan.common.config import OpenAIJudge
from prefscan.common.errors import UserError
from prefscan.endpoints import chat_client
from prefscan.endpoints.workers import Breaker
from prefscan.judging.budget import Spending
from prefscan.judging.judge import Prompt, load_judge
from prefscan.judging.openai import Replies
from prefscan.judging.pairs import MODE as PAIRS
from prefscan.judging.single import MODE as SINGLE

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
        ("`[[ -f x ]] && echo [[0, 1], [1, 0]]` is right: [[9]]", 9),
    ],
)
def test_a_rating_is_read(text: str, score: float) -> None:
    verdict = SINGLE.parse(text)
    assert (verdict.score, verdict.text, verdict.reason) == (score, text, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Rating: 7", "no rating of the form [[n]] in the reply"),
        ("Rating: [7]", "no rating of the form [[n]] in the reply"),
        ("", "no rating of the form [[n]] in the reply"),
        ("[[7]] and [[3]]", "2 different ratings of the form [[n]] in the reply"),
        ("[[7]] and [[7.0]] and [[A]]", "2 different ratings of the form [[n]] in the reply"),
        ("[[7]] or [[8/10]]", "2 different ratings of the form [[n]] in the reply"),
        ("[[good]] and [[fine]]", "2 different ratings of the form [[n]] in the reply"),
        *(
            (f"Rating: [[{rating}]]", f"rating {rating!r} is not a number from 1 to 10")
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
    verdict = SINGLE.parse(text)
    assert (verdict.score, verdict.text, verdict.reason) == (None, text, reason)


@pytest.fixture(autouse=True)
def at_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, a workspace without kept replies, and no waiting between attempts."""
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0)


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
    [
        error(408),
        error(409),
        error(429),
        error(500),
        error(503),
        Reply(fault="closes"),
        Reply(body=b"{" * 99, fault="cuts"),
        Reply(fault="hangs"),
    ],
    ids=[
        "slow request",
        "conflict",
        "rate limit",
        "server error",
        "overloaded",
        "closed connection",
        "closed in mid-reply",
        "time-out",
    ],
)
def test_a_passing_fault_is_tried_again(passing: Reply) -> None:
    verdict, requests = ask([passing, GOOD], timeout=2.0)
    assert (verdict.score, verdict.text) == (6, "Rating: [[6]]")
    assert len(requests) == 2
    assert requests[0] == requests[1]


@pytest.mark.parametrize(
    ("replies", "reason", "count"),
    [
        ([error(500)] * 4, "the server answered 500 (InternalServerError: no)", 4),
        ([Reply(fault="closes")] * 4, "the request failed 4 times (APIConnectionError)", 4),
        ([error(500), error(429), Reply(fault="closes"), error(502)], "the server answered 502", 4),
        ([error(401)], "the server answered 401 (AuthenticationError: no)", 1),
        ([error(400)], "the server answered 400 (BadRequestError: no)", 1),
        ([error(404, "no model\n gpt-4")], "the server answered 404 (NotFoundError: no model gpt-4)", 1),
        ([Reply(400, b"{}")], "the server answered 400 (BadRequestError)", 1),
        ([Reply(400, b"<html>", content_type="text/html")], "the server answered 400 (BadRequestError: <html>)", 1),
        ([error(401, f"wrong key {KEY}.")], "the server answered 401 (AuthenticationError: wrong key ….)", 1),
        ([error(400, "x" * 999)], f"the server answered 400 (BadRequestError: {'x' * 200})", 1),
        ([error(429, code="insufficient_quota")], "the server answered 429 (RateLimitError: no)", 1),
        ([error(429), error(401)], "the server answered 401", 2),
        ([Reply(body=b'{"choices": [{"mess')], "the server sent no chat completion", 1),
        ([Reply(body=b"")], "the server sent no chat completion", 1),
        ([Reply(body=b"<html>Welcome</html>", content_type="text/html")], "the server sent no chat completion", 1),
        ([Reply(body=b"[]")], "the server sent no chat completion", 1),
        ([Reply(body=b"null")], "the server sent no chat completion", 1),
        ([Reply(body=b'{"choices": []}')], "the server sent an empty reply", 1),
        ([Reply(body=b'{"choices": [{"message": null}]}')], "the server sent an empty reply", 1),
        ([Reply(body=b'{"choices": {"message": null}}')], "the server sent an empty reply", 1),
        ([Reply(body=b'{"choices": ["[[7]]"]}')], "the server sent an empty reply", 1),
        ([Reply(body=b'{"choices": "\xff"}')], "the server sent no chat completion", 1),
        ([completion([{"type": "text", "text": "[[7]]"}])], "the server sent a reply that is no text but list", 1),
        ([completion(7)], "the server sent a reply that is no text but int", 1),
        ([completion(""), completion(None)], "no rating of the form [[n]] in the reply", 2),
        ([completion("Rating: [[12]]"), completion("[[0]]")], "rating '0' is not a number from 1 to 10", 2),
        ([completion("8/10"), completion("[[8/10]]")], "rating '8/10' is not a number from 1 to 10", 2),
        ([completion("[[7]] or [[8]]"), completion("fine")], "no rating of the form [[n]] in the reply", 2),
        ([completion("fine"), error(400)], "the server answered 400 (BadRequestError: no)", 2),
    ],
)
def test_a_fault_is_a_verdict_without_score(replies: list[Reply], reason: str, count: int) -> None:
    verdict, requests = ask(replies, attempts=4)
    assert verdict.score is None
    assert reason in verdict.reason
    assert len(requests) == count


@pytest.mark.parametrize("bad", ["Quite good.", "[[0]]", "[[11]]", "[[8/10]]", "[[3]] or [[4]]"])
def test_a_reply_without_one_rating_is_answered_once_with_a_reminder(bad: str) -> None:
    verdict, (first, second) = ask([completion(bad), GOOD])
    assert verdict.score == 6
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": bad},
        {"role": "user", "content": SINGLE.reminder},
    ]
    assert verdict.text == f"{bad}\n\n[{SINGLE.reminder}]\n\nRating: [[6]]"
    assert {key: first[key] for key in first if key != "messages"} == {
        key: second[key] for key in second if key != "messages"
    }


def test_a_failed_turn_shows_both_replies() -> None:
    verdict, _ = ask([completion("Well."), completion("Again, well.")])
    assert verdict.score is None
    assert verdict.text.startswith("Well.")
    assert verdict.text.endswith("Again, well.")


def test_a_reminder_that_is_not_answered_keeps_the_first_reply() -> None:
    """The next run asks for the reminder's answer alone."""
    replies = [completion("Well."), error(400), completion("[[4]]")]
    with chat_server(lambda _, number: replies[number]) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        for score in (None, 4):
            ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
            assert verdict.score == score
        assert len(server.requests) == 3
        assert server.requests[2] == server.requests[1]


def test_an_empty_reply_is_kept_and_not_bought_again() -> None:
    """Of a model, say, that thinks until judge.max_tokens: it is billed like any other."""
    with chat_server(lambda *_: priced("", 1000, 2048)) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url, prices=PRICES))
        for _ in range(3):
            ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
            assert verdict.score is None
            assert verdict.reason.startswith("no rating of the form [[n]] in the reply, kept in ")
        assert len(server.requests) == 2  # the prompt and the reminder
        assert sum(ledger()) == pytest.approx(2 * (0.01 + 0.2048))


def test_half_a_character_costs_no_reply() -> None:
    half = completion("[[7]] and X").body.replace(b"X", b"\\ud83d")
    with chat_server(lambda *_: Reply(body=half)) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        for _ in range(2):
            ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
            assert (verdict.score, verdict.text) == (7, "[[7]] and ?")
        assert len(server.requests) == 1


@pytest.mark.parametrize("usage", [{}, None, {"prompt_tokens": None, "completion_tokens": 3}, {"prompt_tokens": "9"}])
def test_tokens_that_were_not_counted_are_booked_at_their_most(usage: Any) -> None:
    body = json.loads(GOOD.body) | {"usage": usage}
    verdict, _ = ask([Reply(body=json.dumps(body).encode())], prices=PRICES)
    assert (verdict.score, verdict.usd) == (6, 0)
    (booked,) = ledger()
    assert booked > 64 * PRICES["output"] / 1e6  # judge.max_tokens of the reply, and the prompt


@pytest.mark.parametrize(("seed", "sample", "sent"), [(None, 0, None), (None, 2, None), (7, 0, 7), (7, 2, 9)])
def test_a_seed_is_sent_where_one_is_set(seed: int | None, sample: int, sent: int | None) -> None:
    with chat_server(lambda *_: GOOD) as server:
        judge = load_judge(OpenAIJudge.model_validate(openai_judge(server.url, seed=seed)))
        list(judge.verdicts([Prompt("s", "u", sample)]))
    (request,) = server.requests
    assert request.get("seed") == sent
    assert ("seed" in request) == (seed is not None)


def test_the_model_and_fingerprint_that_served_are_kept() -> None:
    body = json.loads(GOOD.body) | {"model": "gpt-4-0613", "system_fingerprint": "fp_1"}
    verdict, _ = ask([Reply(body=json.dumps(body).encode())])
    assert verdict.served_by == "gpt-4-0613 fp_1"
    assert ask([GOOD])[0].served_by == "m"
    reminded, _ = ask([completion("Well."), Reply(body=json.dumps(body).encode())])
    assert (reminded.score, reminded.served_by) == (6, "gpt-4-0613 fp_1")


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
        list(load_judge(OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1"))).verdicts([Prompt("s", "u")]))


def test_a_server_without_a_key_is_asked_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFSCAN_TEST_KEY")
    with chat_server(lambda *_: GOOD) as server:
        judge = load_judge(OpenAIJudge.model_validate(openai_judge(server.url, key_variable=None)))
        assert [verdict.score for _, verdict in judge.verdicts([Prompt("s", "u")])] == [6]


@pytest.mark.parametrize("key", ["“sk-quoted”", "sk-line\r", "sk line\n"])
def test_a_key_that_no_request_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", key)
    with pytest.raises(
        UserError, match=r"^judge\.key_variable: PREFSCAN_TEST_KEY holds .*; export it again"
    ) as failure:
        list(load_judge(OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1"))).verdicts([Prompt("s", "u")]))
    assert "sk" not in str(failure.value)


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real waits: random, so that parallel requests do not return together, and growing with the attempts."""
    monkeypatch.undo()
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    waits: list[float] = []
    monkeypatch.setattr(Breaker, "wait", lambda _, seconds: waits.append(seconds))
    for _ in range(20):
        ask([error(503)] * 8, attempts=8)
    by_attempt = [waits[i::7] for i in range(7)]
    longest = [max(group) for group in by_attempt]
    assert all(late > early for early, late in itertools.pairwise(longest))
    assert all(len(set(group)) == 20 for group in by_attempt)
    assert max(waits) <= 60


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("0", 0.25)])
def test_a_request_waits_for_the_longer_of_back_off_and_retry_after(
    monkeypatch: pytest.MonkeyPatch, asked: str, waited: float
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Breaker, "wait", lambda _, seconds: waits.append(seconds))
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0.25)
    limited = Reply(429, error(429).body, headers={"Retry-After": asked})
    verdict, requests = ask([limited, GOOD])
    assert (verdict.score, len(requests), waits) == (6, 2, [waited])


def test_rate_limits_are_waited_for_by_time_and_not_by_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Breaker, "wait", lambda _, seconds: clock.__setitem__(0, clock[0] + seconds))
    limited = Reply(429, error(429).body, headers={"Retry-After-Ms": "45000", "Retry-After": "7"})
    verdict, requests = ask([*[limited] * 9, GOOD], attempts=1)
    assert (verdict.score, len(requests), clock) == (6, 10, [9 * 45.0])
    clock[0] = 0.0
    verdict, requests = ask([limited] * 99, attempts=1)
    assert verdict.reason == "the server answered 429 (RateLimitError: no)"
    assert (len(requests), clock) == (1 + 900 // 45, [900.0])


def test_a_model_that_reasons_gets_the_fields_that_it_takes() -> None:
    _, (request,) = ask([GOOD], limit_field="max_completion_tokens", temperature=None)
    assert request["max_completion_tokens"] == 64
    assert not {"max_tokens", "temperature"} & set(request)


def test_the_server_may_send_more_than_openai_does() -> None:
    """vLLM and others add fields of their own."""
    body = json.loads(completion("[[2]]").body) | {"prompt_logprobs": None, "extra": {"a": [1]}}
    verdict, _ = ask([Reply(body=json.dumps(body).encode())])
    assert verdict.score == 2


@pytest.mark.parametrize(
    ("text", "score"),
    [("My verdict: [[A]]", 1), ("[[B]]", 0), ("[[C]]", 0.5), ("[[A]], yes, [[A]]", 1), ("[[x]] [[A]]", 1)],
)
def test_a_verdict_on_a_pair_is_read(text: str, score: float) -> None:
    verdict = PAIRS.parse(text)
    assert (verdict.score, verdict.text, verdict.reason) == (score, text, "")


@pytest.mark.parametrize(
    ("text", "count"),
    [("A", "no verdict"), ("[A]", "no verdict"), ("[[D]]", "no verdict"), ("[[A]] [[B]]", "2 different")],
)
def test_a_doubtful_verdict_on_a_pair_is_refused(text: str, count: str) -> None:
    """FastChat takes the first of A, B and C that stands anywhere in the reply."""
    verdict = PAIRS.parse(text)
    assert verdict.score is None
    assert count in verdict.reason


def test_a_judge_of_pairs_is_reminded_of_its_own_format() -> None:
    verdict, (_, second) = ask([completion("[[7]]"), completion("[[C]]")], mode="pair")
    assert verdict.score == 0.5
    assert second["messages"][-1]["content"] == PAIRS.reminder


PRICES = {"input": 10.0, "output": 100.0}


def priced(content: str, input_tokens: int, output_tokens: int) -> Reply:
    usage = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": 0}
    return Reply(body=json.dumps(json.loads(completion(content).body) | {"usage": usage}).encode())


def ledger() -> list[float]:
    path = Path(".prefscan/judgements/spending.jsonl")
    return [json.loads(line)["usd"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_reply_costs_what_its_tokens_cost() -> None:
    verdict, _ = ask([priced("hm", 1000, 20), priced("[[3]]", 2000, 10)], prices=PRICES)
    assert ledger() == pytest.approx([0.012, 0.021])
    assert verdict.usd == pytest.approx(0.033)


def test_a_lost_reply_counts_with_its_most_and_a_refused_request_with_nothing() -> None:
    """The bytes of both messages, 16 tokens around each, and 64 new tokens; the last reply comes without usage."""
    most = (len("You judge.") + len("Judge this.") + 32) * 10e-6 + 64 * 100e-6
    replies = [error(429), error(500), Reply(fault="hangs"), Reply(body=GOOD.body, fault="cuts"), GOOD]
    ask(replies, prices=PRICES, attempts=5, timeout=1.0)
    assert ledger() == pytest.approx([most] * 3)


def test_a_server_that_is_not_there_costs_nothing() -> None:
    settings = OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1", prices=PRICES))
    ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
    assert "failed 3 times" in verdict.reason
    assert ledger() == []


def test_a_cost_that_does_not_fit_on_the_disk_leaves_the_ledger_whole(small_disk: Path) -> None:
    path = small_disk / "spending.jsonl"
    rows = 64 * 1024 // len('{"judge": "gpt", "usd": 0.5}\n')
    path.write_text('{"judge": "gpt", "usd": 0.5}\n' * rows)
    spending = Spending(path, None)
    with pytest.raises(OSError, match=r"No space left|File too large"), spending.purchase(1.0, "gpt") as purchase:
        purchase.usd = 0.5
    assert spending.spent == (rows + 1) * 0.5
    assert Spending(path, None).spent == rows * 0.5


@pytest.mark.parametrize("mode", ["single", "pair"])
def test_equal_prompts_are_asked_once_and_judged_alike(mode: str) -> None:
    """As both orders of a pair of equal answers. Each reply that the server gives is another one."""
    words = itertools.cycle(["[[A]]", "[[B]]"] if mode == "pair" else ["[[3]]", "[[8]]"])
    with chat_server(lambda *_: priced(next(words), 100, 10)) as server:
        changes = {"prices": PRICES, "concurrency": 8, "mode": mode}
        settings = OpenAIJudge.model_validate(openai_judge(server.url, **changes))
        prompts = [Prompt("s", str(place // 2)) for place in range(20)]
        prompts += [replace(prompts[0], sample=1)]
        for _ in ("bought", "kept"):
            found = dict(load_judge(settings).verdicts(prompts))
            assert sorted(found) == list(range(21))
            assert all(found[place].score == found[place + 1].score is not None for place in range(0, 20, 2))
            assert len(server.requests) == len(ledger()) == 11
            assert sum(verdict.usd for verdict in found.values()) == pytest.approx(sum(ledger()))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_budget_is_never_exceeded_and_what_was_bought_stays(concurrency: int) -> None:
    """A request may cost 6,750 millionths of a USD and costs 2,000: 30,000 buy twelve for certain."""
    with chat_server(lambda *_: priced("[[5]]", 100, 10)) as server:

        def run(budget: float | None) -> int:
            changes = {"prices": PRICES, "budget": budget, "concurrency": concurrency}
            settings = OpenAIJudge.model_validate(openai_judge(server.url, **changes))
            found = dict(load_judge(settings).verdicts([Prompt("s", str(n)) for n in range(10, 40)]))
            refused = [verdict.reason for verdict in found.values() if verdict.score is None]
            reason = "judge.budget is 0.03 USD, 0.02 are spent and the request may cost 0.01"
            assert set(refused) <= {reason}
            return len(found) - len(refused)

        assert run(0.03) == len(server.requests) == len(ledger()) == 12
        assert run(0.03) == 12  # all kept ones, and none more
        assert len(server.requests) == 12
        assert run(None) == len(server.requests) == 30


def test_two_processes_do_not_pay_for_one_prompt_twice() -> None:
    started, release = threading.Event(), threading.Event()

    def rate(*_: Any) -> Reply:
        started.set()
        release.wait(30)
        return GOOD

    with chat_server(rate) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        first = threading.Thread(target=lambda: list(load_judge(settings).verdicts([Prompt("s", "u")])))
        first.start()
        assert started.wait(30)
        threading.Timer(0.5, release.set).start()
        ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
        first.join()
        assert (verdict.score, len(server.requests)) == (6, 1)


def test_a_queued_experiment_shares_the_replies(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC runs it in a copy of the repository, under .dvc/tmp/exps, which it deletes."""
    copy = in_tmp / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    with chat_server(lambda *_: GOOD) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url))
        for folder in (in_tmp, copy):
            monkeypatch.chdir(folder)
            ((_, verdict),) = load_judge(settings).verdicts([Prompt("s", "u")])
            assert verdict.score == 6
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "gpt-5"},
        {"host": "localhost"},
        {"max_tokens": 65},
        {"seed": 1},
        {"sample": 1},
        {"system": "Rate it!"},
        {"user": "Other"},
    ],
)
def test_a_kept_reply_belongs_to_its_judge_and_prompt(change: dict[str, Any]) -> None:
    with chat_server(lambda *_: GOOD) as server:
        for changes in ({}, {}, change):
            prompt = {"system": "Rate it.", "user": "Hello", "sample": 0}
            judge = openai_judge(server.url)
            for name, value in changes.items():
                if name == "host":
                    judge["base_url"] = server.url.replace("127.0.0.1", value)
                else:
                    (prompt if name in prompt else judge)[name] = value
            list(load_judge(OpenAIJudge.model_validate(judge)).verdicts([Prompt(**prompt)]))
        assert len(server.requests) == 2


def test_a_kept_reply_belongs_to_the_server_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = set()
    for port in (1, 2):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        paths.add(Replies(Path(), None).path({"model": "gpt-4"}, 0))
    assert len(paths) == 2


@pytest.mark.parametrize("change", [{"timeout": 1.0}, {"attempts": 9}, {"concurrency": 1}, {"prices": PRICES}])
def test_how_a_judge_is_reached_does_not_cost_its_replies(change: dict[str, Any]) -> None:
    with chat_server(lambda *_: GOOD) as server:
        for changes in ({}, change):
            settings = OpenAIJudge.model_validate(openai_judge(server.url, **changes))
            list(load_judge(settings).verdicts([Prompt("s", "u")]))
        assert len(server.requests) == 1


# Pieces of which a reply may be made: what is nearly a rating is likelier so than in any text.
PIECES = ["[[", "]]", "[", "]", "7", "10", "11", "0", ".", "-", "1e1", "٣", "A", "B", "C", "tie", " ", "\n", "Rating: "]


@settings(max_examples=3000, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_any_reply_is_a_score_in_range_or_a_reason(text: str) -> None:
    rating, winner = SINGLE.parse(text), PAIRS.parse(text)
    for verdict, most in ((rating, 10), (winner, 1)):
        assert verdict.text == text
        assert (verdict.score is None) == bool(verdict.reason)
        assert verdict.score is None or 0 <= verdict.score <= most
    if rating.score is not None:
        (written,) = set(re.findall(r"\[\[([0-9.]+)\]\]", text))
        assert rating.score == float(written) >= 1
    if winner.score is not None:
        letter = {1.0: "A", 0.0: "B", 0.5: "C"}[winner.score]
        assert f"[[{letter}]]" in text
