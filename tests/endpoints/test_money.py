"""What judging costs, and what it waits for: every case with its count of requests and, where money flows, of USD."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from chat_server import Reply, chat_server, completion, error
from mtbench_data import ROOT, openai_judge
from prefscan.common.config import OpenAIJudge
from prefscan.endpoints import chat_client
from prefscan.endpoints.chat_client import Limits, is_loopback, proxy_of
from prefscan.endpoints.workers import Breaker
from prefscan.judging.judge import Prompt, Verdict, load_judge

PRICES = {"input": 10.0, "output": 100.0}
LEDGER = Path(".prefscan/judgements/spending.jsonl")


@pytest.fixture(autouse=True)
def at_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0)


def counted(prompt: int, reply: int, total: int, content: str = "[[7]]") -> Reply:
    usage = {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": total}
    return Reply(body=json.dumps(json.loads(completion(content).body) | {"usage": usage}).encode())


def judged(answer: Any, prompts: int = 1, **changes: Any) -> tuple[dict[int, Verdict], int]:
    with chat_server(answer) as server:
        settings = OpenAIJudge.model_validate(openai_judge(server.url, **changes))
        verdicts = dict(load_judge(settings).verdicts(Prompt("s", f"Judge {i}.") for i in range(prompts)))
        return verdicts, len(server.requests)


def booked() -> list[float]:
    return [json.loads(line)["usd"] for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []


def test_thinking_that_stands_in_the_total_alone_is_billed() -> None:
    """100 + 10 of 2,110 tokens: 2,010 are the reply's."""
    verdicts, requests = judged(lambda *_: counted(100, 10, 2110), prices=PRICES)
    assert requests == 1
    assert booked() == [pytest.approx(100 * 10e-6 + 2010 * 100e-6)]
    assert verdicts[0].usd == pytest.approx(0.202)


def test_the_budget_holds_against_thinking_in_the_total() -> None:
    """Each request may cost 0.2 USD and does cost 0.202: the budget of 1 USD is not asked for a fifth."""
    verdicts, requests = judged(
        lambda *_: counted(100, 10, 2110), prompts=20, concurrency=1, prices=PRICES, budget=1.0, max_tokens=2000
    )
    assert requests == 4
    assert sum(booked()) == pytest.approx(4 * 0.202)
    assert sum("judge.budget is 1.00 USD" in verdict.reason for verdict in verdicts.values()) == 16


@pytest.mark.parametrize(
    "reply",
    [
        error(429, "You exceeded your current quota", "insufficient_quota"),
        error(400, "limit reached", "billing_hard_limit_reached"),
        Reply(429, b'{"error": {"message": "pay", "type": "exceeded_current_quota_error", "code": null}}'),
        Reply(402, b'{"error": {"message": "Insufficient Balance"}}'),
        Reply(body=b'{"error": {"message": "no credits left", "code": 402}}'),
        error(401, "wrong key"),
        error(404, "no such model", "model_not_found"),
        Reply(429, error(429, "come back tomorrow").body, headers={"Retry-After": "7200"}),
    ],
    ids=["quota", "billing", "by type", "402", "402 in a 200", "key", "model", "hours"],
)
def test_what_no_waiting_mends_stops_all_at_once(reply: Reply) -> None:
    started = time.monotonic()
    verdicts, requests = judged(lambda *_: reply, prompts=40, concurrency=16, prices=PRICES)
    assert requests == 1
    assert booked() == []
    assert time.monotonic() - started < 10
    words = json.loads(reply.body)["error"]["message"]
    assert all(words in verdict.reason and verdict.passing for verdict in verdicts.values())


def test_a_prompt_that_used_up_its_waiting_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 minutes in all, by a clock of the test, and not for each of 40 prompts."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Breaker, "wait", lambda _, seconds: clock.__setitem__(0, clock[0] + seconds))
    limited = Reply(429, error(429, "slow down").body, headers={"Retry-After": "60"})
    verdicts, requests = judged(lambda *_: limited, prompts=40, concurrency=1)
    assert clock[0] <= 900
    assert requests == 1 + 900 // 60
    assert all("slow down" in verdict.reason for verdict in verdicts.values())


def test_a_server_that_fails_each_prompt_stops_the_stage() -> None:
    verdicts, requests = judged(lambda *_: error(500, "broken"), prompts=40, concurrency=8, attempts=2)
    assert requests == 3 * 2
    assert all("broken" in verdict.reason for verdict in verdicts.values())


def test_a_fault_of_one_prompt_stops_nothing() -> None:
    def answer(request: dict[str, Any], _: int) -> Reply:
        return error(500) if request["messages"][1]["content"] in ("Judge 3.", "Judge 5.") else completion("[[7]]")

    verdicts, _ = judged(answer, prompts=9, concurrency=1, attempts=1)
    assert [place for place, verdict in sorted(verdicts.items()) if verdict.score is None] == [3, 5]


STAGE = """
import sys
from prefscan.common.config import OpenAIJudge
from prefscan.judging.judge import Prompt, load_judge
import json
settings = OpenAIJudge.model_validate(json.loads(sys.argv[1]))
print("ready", flush=True)
for _ in load_judge(settings).verdicts(Prompt("s", f"Judge {i}.") for i in range(40)):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("state", ["waits", "asks"])
def test_an_interrupted_stage_ends_within_two_seconds_and_asks_no_more(number: int, state: str) -> None:
    """While its workers sleep on a rate limit, and while their requests hang; these count with their most."""
    busy = threading.Event()

    def answer(_: dict[str, Any], request: int) -> Reply:
        if request == 0:
            return completion("[[7]]")
        if request >= 4:
            busy.set()
        limited = Reply(429, error(429).body, headers={"Retry-After": "300"})
        return limited if state == "waits" else Reply(fault="hangs")

    with chat_server(answer) as server:
        settings = openai_judge(server.url, concurrency=4, prices=PRICES)
        stage = subprocess.Popen(
            [sys.executable, "-c", STAGE, json.dumps(settings)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert busy.wait(60)
        time.sleep(0.3)
        before, started = len(server.requests), time.monotonic()
        stage.send_signal(number)
        _, said = stage.communicate(timeout=10)
        # Processors that others use as well slow the interpreter's end down.
        assert time.monotonic() - started < 2 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert stage.returncode
        assert number == signal.SIGTERM or "KeyboardInterrupt" in said
        time.sleep(0.3)
        assert len(server.requests) == before == 5
    most = booked()
    # The first reply came without usage, so at its most; as many more as hung.
    assert len(most) == (5 if state == "asks" else 1)


def test_loopback_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    verdicts, requests = judged(lambda *_: completion("[[7]]"))
    assert (verdicts[0].score, requests) == (7, 1)


def test_a_connection_error_names_the_address_and_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    judge = OpenAIJudge.model_validate(openai_judge("http://judge.example/v1", attempts=2, concurrency=4))
    verdicts = dict(load_judge(judge).verdicts(Prompt("s", str(i)) for i in range(9)))
    assert all(
        "the request failed 2 times (APIConnectionError) at http://judge.example/v1 through the proxy "
        "http://127.0.0.1:9" in verdict.reason
        for verdict in verdicts.values()
    )
    assert not any("secret" in verdict.reason for verdict in verdicts.values())


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1/v1", True),
        ("http://localhost/", True),
        ("http://[::1]:8/", True),
        ("http://10.0.0.1/", False),
    ],
)
def test_what_is_loopback(url: str, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert is_loopback(url) == here
    assert proxy_of(url) == (None if here else "http://proxy.example:3128")


def test_requests_and_tokens_a_minute_are_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    breaker = Breaker()
    monkeypatch.setattr(Breaker, "wait", lambda _, seconds: clock.__setitem__(0, clock[0] + seconds))
    sent = []
    limits = Limits(requests=3, tokens=None)
    for _ in range(7):
        limits.wait(10, breaker)
        sent.append(clock[0])
    assert sent == [0, 0, 0, 60, 60, 60, 120]
    clock[0], sent = 0.0, []
    limits = Limits(requests=None, tokens=100)
    for tokens in (60, 30, 30, 500, 10):  # one over the limit by itself goes alone
        limits.wait(tokens, breaker)
        sent.append(clock[0])
    assert sent == [0, 0, 60, 120, 180]


def test_the_limits_are_those_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def wait(_: Breaker, seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(Breaker, "wait", wait)
    _, requests = judged(lambda *_: completion("[[7]]"), prompts=5, concurrency=1, requests_per_minute=2)
    assert (requests, pauses) == (5, [60, 60])


def test_any_model_and_further_fields_are_sent() -> None:
    with chat_server(lambda *_: completion("[[7]]")) as server:
        judge = openai_judge(
            server.url,
            model="qwen/qwen3-32b:free",
            extra_body={"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            headers={"X-Title": "prefscan"},
            query={"api-version": "2024-10-21"},
        )
        list(load_judge(OpenAIJudge.model_validate(judge)).verdicts([Prompt("s", "u")]))
    (request,) = server.requests
    assert request["model"] == "qwen/qwen3-32b:free"
    assert request["reasoning_effort"] == "low"
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert request["path"] == "/v1/chat/completions?api-version=2024-10-21"


@pytest.mark.parametrize("field", ["model", "n", "stream", "max_tokens"])
def test_a_further_field_may_not_replace_one_of_ours(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} of a request is set elsewhere"):
        OpenAIJudge.model_validate(openai_judge("http://127.0.0.1:9/v1", extra_body={field: 1}))
