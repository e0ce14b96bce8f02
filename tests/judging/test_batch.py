"""The Batch API as a mode of the judge: submitted once, polled, found again after a kill, and paid once."""

import json
from pathlib import Path
from typing import Any

import pytest

from batch_server import BatchServer, batch_server
from chat_server import Reply, completion, error
from mtbench_data import openai_judge
from prefscan.common.config import OpenAIJudge
from prefscan.common.errors import UserError
from prefscan.endpoints import chat_client
from prefscan.judging.judge import Prompt, Verdict, load_judge

PRICES = {"input": 10.0, "output": 100.0}
RECORDS = Path(".prefscan/judgements/batches")
LEDGER = Path(".prefscan/judgements/spending.jsonl")
COST = (1000 * 10e-6 + 20 * 100e-6) / 2  # of each reply, at half the price


@pytest.fixture(autouse=True)
def at_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    monkeypatch.setattr(chat_client, "wait_random_exponential", lambda **_: lambda _: 0)


def priced(content: str) -> Reply:
    usage = {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020}
    return Reply(body=json.dumps(json.loads(completion(content).body) | {"usage": usage}).encode())


def rate(body: dict[str, Any]) -> Reply:
    """The number in the prompt; at first no rating for number 3."""
    number = body["messages"][1]["content"].split()[-1]
    if number == "3" and len(body["messages"]) == 2:
        return priced("Well.")
    return priced(f"[[{number}]]")


def judged(server: BatchServer, count: int = 5, **changes: Any) -> dict[int, Verdict]:
    batch = {"poll_seconds": 0.01, "discount": 0.5}
    settings = OpenAIJudge.model_validate(openai_judge(server.url, **{"batch": batch, "prices": PRICES} | changes))
    return dict(load_judge(settings).verdicts(Prompt("s", f"Rate {i}") for i in range(1, count + 1)))


def booked() -> list[float]:
    return [json.loads(line)["usd"] for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []


def created(server: BatchServer) -> int:
    return server.calls.count("POST /batches")


def test_replies_come_from_a_batch_and_reminders_from_a_second() -> None:
    with batch_server(rate, polls=2) as server:
        verdicts = judged(server, extra_body={"reasoning_effort": "low"})
        assert {place: verdict.score for place, verdict in verdicts.items()} == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}
        assert "POST /chat/completions" not in server.calls
        assert created(server) == 2
        first = [json.loads(line) for line in next(iter(server.files.values())).splitlines()]
        assert [sorted(line) for line in first] == [["body", "custom_id", "method", "url"]] * 5
        assert {(line["method"], line["url"]) for line in first} == {("POST", "/v1/chat/completions")}
        assert first[0]["body"]["reasoning_effort"] == "low"
        assert "extra_body" not in first[0]["body"]
        assert booked() == [pytest.approx(COST)] * 6
        assert sum(verdict.usd for verdict in verdicts.values()) == pytest.approx(6 * COST)
        calls = len(server.calls)
        assert judged(server, extra_body={"reasoning_effort": "low"}) == verdicts
        assert len(server.calls) == calls  # all is kept
    assert not list(RECORDS.iterdir())


@pytest.mark.parametrize("at", ["POST /batches", "GET /batches/", "GET /files/"])
def test_a_stage_that_is_killed_finds_its_batch_again(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just after the batch was created, while it waited, or before it got the replies."""
    with batch_server(rate) as server:
        resource = {"POST /batches": "create", "GET /batches/": "retrieve"}.get(at)
        with monkeypatch.context() as killed:
            if resource:
                from openai.resources.batches import Batches as Client

                before = getattr(Client, resource)

                def kill(*arguments: Any, **options: Any) -> Any:
                    before(*arguments, **options)
                    raise SystemExit("killed")

                killed.setattr(Client, resource, kill)
            else:
                from prefscan.judging.openai import Replies

                killed.setattr(Replies, "put", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
            with pytest.raises(SystemExit):
                judged(server, 2)
        assert created(server) == 1
        verdicts = judged(server, 2)
        assert [verdict.score for _, verdict in sorted(verdicts.items())] == [1, 2]
        assert created(server) == 1
        assert booked() == [pytest.approx(COST)] * 2


def test_a_batch_under_way_is_waited_for_where_no_batch_is_wanted_any_more() -> None:
    with batch_server(rate, polls=3) as server:
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr("prefscan.judging.batch.Batches._ended", lambda *_: (_ for _ in ()).throw(SystemExit()))
            with pytest.raises(SystemExit):
                judged(server, 2)
        with pytest.MonkeyPatch.context() as quick:
            quick.setattr("prefscan.judging.batch.POLL_SECONDS", 0.01)
            assert [verdict.score for _, verdict in sorted(judged(server, 2, batch=None).items())] == [1, 2]
        assert (created(server), server.calls.count("POST /chat/completions")) == (1, 0)
        assert booked() == [pytest.approx(COST)] * 2


def test_a_creation_whose_answer_got_lost_is_not_repeated() -> None:
    with batch_server(rate) as server:
        lost = []

        def fail(method: str, path: str) -> Reply | None:
            if (method, path) == ("POST", "/batches") and not lost:
                lost.append(server.create({"input_file_id": next(iter(server.files)), **WANTED, "metadata": mark()}))
                return Reply(fault="closes")
            return None

        def mark() -> dict[str, str]:
            return {"prefscan": next(RECORDS.glob("*.json")).stem}

        server.fail = fail
        assert [verdict.score for _, verdict in sorted(judged(server, 2).items())] == [1, 2]
        assert len(server.batches) == 1
        assert booked() == [pytest.approx(COST)] * 2


WANTED = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_what_expired_or_failed_is_not_paid_and_asked_for_in_the_next_run() -> None:
    broken = True

    def answer(body: dict[str, Any]) -> Reply | None:
        number = body["messages"][1]["content"].split()[-1]
        if broken and number == "2":
            return None
        return error(400, "bad prompt") if number == "4" else rate(body)

    with batch_server(answer, status="expired") as server:
        verdicts = judged(server, 5, max_tokens=65)
        assert [verdict.score for _, verdict in sorted(verdicts.items())] == [1, None, 3, None, 5]
        assert verdicts[1].passing
        assert verdicts[1].reason.startswith("the batch has batch_expired for it: This request could not be executed")
        assert not verdicts[3].passing
        assert verdicts[3].reason == "the batch has 400 for it: bad prompt"
        assert booked() == [pytest.approx(COST)] * 4  # one reminder
        broken = False
        assert judged(server, 5, max_tokens=65)[1].score == 2
        assert booked() == [pytest.approx(COST)] * 5


def test_a_batch_that_fails_says_why() -> None:
    with batch_server(rate, status="failed") as server:
        verdicts = judged(server, 2)
        assert all("ended as failed without it: Enqueued token limit reached" in v.reason for v in verdicts.values())
        assert all(verdict.passing for verdict in verdicts.values())
        assert booked() == []


def test_a_batch_stays_within_the_budget_and_what_fits_later_follows() -> None:
    """Each may cost 0.0042 USD at half the price and costs 0.006."""
    with batch_server(rate) as server:
        verdicts = judged(server, 8, budget=0.02, max_tokens=64)
        assert sum(booked()) <= 0.02 + COST * 4  # the server counted more than the bytes of the prompts allow
        assert sum("judge.budget is 0.02 USD" in verdict.reason for verdict in verdicts.values()) >= 4


def test_a_batch_that_cannot_be_looked_up_is_an_error_and_its_record_stays() -> None:
    with batch_server(rate) as server:
        server.fail = lambda method, path: error(403, "no") if path.startswith("/batches/") else None
        with pytest.raises(
            UserError, match=r"batches/[0-9a-f]+\.json: the batch batch_0+ cannot be looked up \(the server "
        ):
            judged(server, 2)
        server.fail = lambda *_: None
        assert judged(server, 2)[0].score == 1
        assert created(server) == 1


def test_a_wrong_key_submits_nothing() -> None:
    with batch_server(rate) as server:
        server.fail = lambda *_: error(401, "wrong key")
        verdicts = judged(server, 4)
        assert all("wrong key" in verdict.reason for verdict in verdicts.values())
        assert len(server.calls) == 1
    assert not RECORDS.exists() or not list(RECORDS.iterdir())
