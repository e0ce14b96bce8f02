"""Answers and judgements through servers: real ones of `transformers serve`, and one that fails as it is told."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chat_server import Reply, chat_server, completion, error
from mtbench_data import CATEGORIES, ROOT, make_questions, openai_judge, write_params, write_questions
from prefscan.common.config import Server
from prefscan.common.errors import UserError
from prefscan.common.io import write_json
from prefscan.endpoints.chat_client import Session
from prefscan.endpoints.server import Served, free_port, running_server, served_name
from prefscan.generation.answers import TEMPERATURES
from prefscan.generation.server_client import Generation, ask_question, request_body, request_seed
from prefscan.models.loading import load_model, manifest
from prefscan.stages import answer as stage
from prefscan.stages import mtbench
from tiny import make_parrot, random_adapter

KEY = "sk-very-secret"
GREEDY = [category for category in CATEGORIES if TEMPERATURES[category] == 0]


def served(kind: str = "other", base_url: str | None = None, **changes: Any) -> dict[str, Any]:
    server = {
        "kind": kind,
        "base_url": base_url,
        "key_variable": None,
        "headers": {},
        "query": {},
        "extra_body": {},
        "thinking": "keep",
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "concurrency": 1,
        "timeout": 60.0,
        "attempts": 2,
    }
    sizes = {"questions": 8, "max_new_tokens": 6, "batch_size": 4}
    return {"engine": "openai", "server": server | changes} | sizes


def prepare(root: Path, model: Path, settings: dict[str, Any], **params: Any) -> None:
    write_params(root, answer=settings, **params)
    write_questions(root, make_questions(1))
    (root / "models").mkdir(exist_ok=True)
    (root / "models/base").symlink_to(model)
    for name in ("dvc.yaml", "src"):
        (root / name).symlink_to(ROOT / name)


def written() -> dict[int, Any]:
    lines = Path("data/mt_bench/model_answer/base.jsonl").read_text().splitlines()
    return {row["question_id"]: row for row in map(json.loads, lines)}


def test_a_real_server_answers_as_this_process_does(in_tmp: Path, tiny_model: Path) -> None:
    """Greedy answers are the same texts; sampled ones repeat, and both stages write the same format."""
    prepare(in_tmp, tiny_model, served("transformers"))
    stage.main("base")
    first = written()
    metrics = json.loads(Path("metrics/answer/base.json").read_text())
    assert set(metrics) == {"questions", "mean_tokens", "share_truncated", "repetition", "thinking"}
    stage.main("base")
    assert written() == first
    write_params(in_tmp, answer={"questions": 8, "max_new_tokens": 6, "batch_size": 4})
    stage.main("base")
    here = written()
    assert list(here) == list(first)
    category = {question["question_id"]: question["category"] for question in make_questions(1)}
    same = [
        category[number]
        for number in here
        if here[number]["choices"][0]["turns"] == first[number]["choices"][0]["turns"]
    ]
    assert set(GREEDY) <= set(same)
    assert len(same) < len(CATEGORIES)  # other random numbers sample other words
    assert [list(row) for row in here.values()] == [list(row) for row in first.values()]
    greedy = [number for number in here if category[number] in GREEDY]
    assert [here[n]["choices"][0]["truncated"] for n in greedy] == [first[n]["choices"][0]["truncated"] for n in greedy]


def test_a_real_server_judges(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the question over the real client to the average: a model that says nothing but its rating."""
    parrot = make_parrot(in_tmp / "parrot", "[[7]]")
    prepare(in_tmp, parrot, served("transformers"))
    stage.main("base")
    assert {turn for row in written().values() for turn in row["choices"][0]["turns"]} == {"[[7]]"}
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)
    # Its name is the folder as the server was told, here without a slash.
    with running_server(Served("transformers", Path("parrot"), {}, "fp32"), Path("judge.log")) as url:
        judge = openai_judge(url, name="parrot", model="parrot", max_tokens=16, concurrency=4)
        write_params(in_tmp, answer={"questions": 8}, judge=judge)
        mtbench.main("base")
    metrics = json.loads(Path("metrics/mtbench/base.json").read_text())
    assert (metrics["average"], metrics["first_turn"], metrics["second_turn"]) == (7, 7, 7)
    assert metrics["served_by"] == ["parrot@main"]
    assert not [path for path in in_tmp.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_questions_are_asked_at_once_and_written_in_order(
    in_tmp: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", KEY)

    def reply(request: dict[str, Any], _: int) -> Reply:
        return completion(f" answer to {request['messages'][-1]['content']}\n")

    with chat_server(reply) as server:
        prepare(
            in_tmp,
            tiny_model,
            served(base_url=server.url, concurrency=8, key_variable="PREFSCAN_TEST_KEY"),
        )
        stage.main("base")
    rows = written()
    assert list(rows) == [question["question_id"] for question in make_questions(1)]
    for question in make_questions(1):
        row = rows[question["question_id"]]["choices"][0]
        assert row["turns"] == [f"answer to {text}" for text in question["turns"]]
        assert row["truncated"] == [False, False]
        # The tiny tokenizer has a token a byte; the raw reply has a space and a line end more; and the end token.
        assert row["tokens"] == [len(text.encode()) + 3 for text in row["turns"]]
    assert set(server.keys) == {f"Bearer {KEY}"}
    bodies = {(r["messages"][0]["content"], len(r["messages"])): r for r in server.requests}
    assert len(bodies) == len(server.requests) == 16
    for question in make_questions(1):
        first, second = (bodies[(question["turns"][0], length)] for length in (1, 3))
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert second["messages"][1]["content"] == f"answer to {question['turns'][0]}"
        assert first["temperature"] == second["temperature"] == TEMPERATURES[question["category"]]
        assert first["seed"] != second["seed"]
        assert (first["model"], first["max_tokens"], first["top_p"]) == ("base", 6, 1.0)
    cost = json.loads(Path("metrics/cost/answer/base.json").read_text())
    assert cost["at_once"] == 8
    assert not [path for path in in_tmp.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        (error(400), 1, r"the server answered 400 \(BadRequestError: no\)"),
        (error(500), 2, r"the server answered 500 \(InternalServerError: no\)"),
        (Reply(fault="closes"), 2, r"the request failed 2 times \(APIConnectionError\)"),
        (Reply(body=b"CUDA out of memory"), 1, r"the server sent no chat completion"),
        (
            Reply(body=completion("x").body.replace(b'"stop"', b'"content_filter"')),
            1,
            r"ended the reply with 'content_filter'",
        ),
        (Reply(body=re.sub(rb'"choices": \[.*\]', b'"choices": []', completion("x").body)), 1, "an empty reply"),
        (completion([{"type": "text", "text": "x"}]), 1, "a reply that is no text but list"),
    ],
)
def test_a_fault_is_an_error_and_keeps_what_is_answered(
    in_tmp: Path, tiny_model: Path, fault: Reply, requests: int, message: str
) -> None:
    """In the second turn of the fourth question; the next run asks for the five questions that are left."""
    broken = True

    def reply(request: dict[str, Any], _: int) -> Reply:
        fourth = "math" in request["messages"][0]["content"] and len(request["messages"]) == 3
        return fault if fourth and broken else completion("fine")

    with chat_server(reply) as server:
        prepare(in_tmp, tiny_model, served(base_url=server.url))
        with pytest.raises(UserError, match=rf"^question 84, turn 2: .*{message}"):
            stage.main("base")
        assert not Path("data/mt_bench").exists()
        assert len(server.requests) == 3 * 2 + 1 + requests
        broken = False
        stage.main("base")
        assert len(server.requests) == 3 * 2 + 1 + requests + 5 * 2
    assert len(written()) == 8


def test_an_answer_of_no_words_is_an_answer_and_a_cut_one_is_marked(in_tmp: Path, tiny_model: Path) -> None:
    def reply(request: dict[str, Any], _: int) -> Reply:
        if len(request["messages"]) == 1:
            return completion("")
        return Reply(body=completion("abc").body.replace(b'"stop"', b'"length"'))

    with chat_server(reply) as server:
        prepare(in_tmp, tiny_model, served(base_url=server.url))
        stage.main("base")
    for row in written().values():
        assert row["choices"][0] == {"index": 0, "turns": ["", "abc"], "tokens": [1, 3], "truncated": [False, True]}
    assert json.loads(Path("metrics/answer/base.json").read_text())["share_truncated"] == 0.5


def test_each_kind_of_server_is_asked_for_plain_sampling_in_its_words() -> None:
    def body(kind: str, temperature: float) -> dict[str, Any]:
        server = Server.model_validate(served(kind, "http://127.0.0.1:9/v1")["server"])
        return request_body(server, Generation("base", None, 6, 0, [2, 7]), [], temperature, 5)  # type: ignore[arg-type]

    plain = {"model": "base", "messages": [], "top_p": 1.0, "max_tokens": 6, "seed": 5}
    assert body("other", 0.7) == plain | {"temperature": 0.7}
    assert body("other", 0.00001)["temperature"] == 0.0
    assert body("vllm", 0.7)["extra_body"] == {
        **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2, 7]}
    }
    for temperature, samples in ((0.7, True), (0.0, False)):
        configuration = json.loads(body("transformers", temperature)["extra_body"]["generation_config"])
        assert configuration == {
            **{"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0},
            **{"do_sample": samples, "top_k": 0, "eos_token_id": [2, 7], "pad_token_id": 2},
        }


@pytest.mark.parametrize(("ends", "last"), [([0, 2], 2), ([0, 1], 0)], ids=["the tokenizer's", "the first"])
def test_an_answer_ends_with_the_token_that_ends_a_turn(tokenizer: Any, ends: list[int], last: int) -> None:
    """Qwen2.5's <|endoftext|> has a lower number than its <|im_end|>."""
    assert tokenizer.eos_token_id == 2

    def reply(request: dict[str, Any], _: int) -> Reply:
        return completion("abc" if len(request["messages"]) == 1 else "")

    (question,) = make_questions(1, ["math"])
    with chat_server(reply) as server:
        settings = Server.model_validate(served(base_url=server.url)["server"])
        generation = Generation("base", tokenizer, 6, 0, ends)
        replies = ask_question(Session(settings, "answer.server"), settings, generation, question, 0.0)
    said = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert [found.tokens for found in replies] == [[*said, last], [last]]


CELL = "ipo-0.1-8"


@pytest.fixture
def trained(in_tmp: Path, tiny_model: Path) -> Callable[[int], None]:
    """Trains CELL with a seed: its adapter, and merge's manifest of it."""
    prepare(in_tmp, tiny_model, served("vllm", "http://127.0.0.1:9/v1"))

    def train(seed: int) -> None:
        random_adapter(load_model(tiny_model, "fp32"), seed=seed).save_pretrained(f"models/adapters/{CELL}")
        parts = manifest(Path("models/base"), Path("models/adapters", CELL))
        write_json(Path("models/merged", CELL, "manifest.json"), parts)

    train(0)
    return train


def ask_cell(root: Path, url: str, key: str = CELL) -> None:
    grid = {"loss": ["ipo"], "beta": [0.1], "steps": [8]}
    write_params(root, answer=served("vllm", url), loss="ipo", beta=0.1, steps=8, grid=grid)
    stage.main(key)


def test_a_server_with_weights_of_before_is_not_asked(in_tmp: Path, trained: Callable[[int], None]) -> None:
    """`prefscan serve`'s names are of the weights that it loaded; a cell that is trained again has another."""
    with chat_server(lambda *_: completion("fine"), [served_name("base"), served_name(CELL)]) as server:
        for key in ("base", CELL):
            ask_cell(in_tmp, server.url, key)
            assert {request["model"] for request in server.requests} == {served_name(key)}
            rows = map(json.loads, Path(f"data/mt_bench/model_answer/{key}.jsonl").read_text().splitlines())
            assert {row["model_id"] for row in rows} == {key}
            server.requests.clear()
        trained(1)
        Path(f"data/mt_bench/model_answer/{CELL}.jsonl").unlink()  # as DVC does before a stage
        with pytest.raises(
            UserError, match=rf"^answer\.server\.base_url: .* does not serve {CELL}@.*; restart `prefscan serve`$"
        ):
            ask_cell(in_tmp, server.url)
        assert not server.requests
        assert not Path(f"data/mt_bench/model_answer/{CELL}.jsonl").exists()
        server.models = [served_name("base"), served_name(CELL)]  # restarted
        ask_cell(in_tmp, server.url)
        assert {request["model"] for request in server.requests} == {served_name(CELL)}


@pytest.mark.parametrize("models", [None, [], ["base", CELL], ["llama@main"]], ids=str)
def test_a_server_of_another_kind_is_asked_for_the_key(
    in_tmp: Path,
    trained: Callable[[int], None],
    models: list[str] | None,
) -> None:
    with chat_server(lambda *_: completion("fine"), models) as server:
        ask_cell(in_tmp, server.url)
        assert {request["model"] for request in server.requests} == {CELL}


@pytest.mark.parametrize(
    ("kind", "key", "adapters", "name"),
    [
        ("vllm", CELL, {CELL: Path("models/adapters", CELL)}, CELL),
        ("vllm", "base", {}, "base"),
        ("transformers", "base", {}, "models/base"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_a_server_that_the_stage_starts_is_asked_for_the_model_that_it_was_started_with(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str, adapters: dict[str, Path], name: str
) -> None:
    """A server of the test's own in place of vLLM, which is asked for `base` and adapters by their names."""
    started: list[Any] = []
    with chat_server(lambda *_: completion("fine")) as server:

        @contextmanager
        def running(*arguments: Any) -> Iterator[str]:
            started.append(arguments[0])
            yield server.url

        monkeypatch.setattr("prefscan.endpoints.server.running_server", running)
        grid = {"loss": ["ipo"], "beta": [0.1], "steps": [8]}
        write_params(in_tmp, answer=served(kind), loss="ipo", beta=0.1, steps=8, grid=grid)
        stage.main(key)
        assert started == [Served(kind, Path("models/base"), adapters, "fp32")]  # type: ignore[arg-type]
        assert {request["model"] for request in server.requests} == {name}


def test_a_server_that_cannot_be_reached_is_named(in_tmp: Path, trained: Callable[[int], None]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=rf"^answer\.server\.base_url: {url} cannot be reached \(APIConnectionError\)"):
        ask_cell(in_tmp, url)


def test_a_stage_stopped_after_its_last_answer_needs_no_server(
    in_tmp: Path, trained: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_server(lambda *_: completion("fine")) as server:
        with monkeypatch.context() as stopped:
            stopped.setattr(stage, "write_jsonl", lambda *_: sys.exit(1))
            with pytest.raises(SystemExit):
                ask_cell(in_tmp, server.url)
        url = server.url
    ask_cell(in_tmp, url)
    assert Path(f"data/mt_bench/model_answer/{CELL}.jsonl").exists()


def test_seeds_differ_by_question_turn_and_seed_and_fit_every_server() -> None:
    seeds = {request_seed(seed, question, turn) for seed in range(3) for question in range(81, 161) for turn in (0, 1)}
    assert len(seeds) == 480
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(0, 81, 0) == request_seed(0, 81, 0)
