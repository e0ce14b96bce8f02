"""Answers from a server: its own count of a prompt, and thinking, which is no answer."""

import json
from typing import Any

import pytest

from chat_server import Reply, chat_server, completion
from mtbench_data import make_questions
from prefscan.common.config import Server
from prefscan.common.errors import UserError
from prefscan.endpoints.chat_client import Session
from prefscan.generation.server_client import (
    TOLERANCE,
    Generation,
    ask_question,
    ask_questions,
    our_prompt,
    request_body,
)

QUESTION = make_questions(1, ["math"])[0]


def server_of(url: str, **changes: Any) -> Server:
    settings = {
        "kind": "other",
        "base_url": url,
        "key_variable": None,
        "headers": {},
        "query": {},
        "extra_body": {},
        "thinking": "keep",
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "concurrency": 1,
        "timeout": 30.0,
        "attempts": 2,
    }
    return Server.model_validate(settings | changes)


def reply(content: str, finish: str = "stop", prompt_tokens: int | None = None, **message: Any) -> Reply:
    body = json.loads(completion(content).body)
    body["choices"][0]["message"] |= message
    body["choices"][0]["finish_reason"] = finish
    if prompt_tokens is not None:
        body["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
    return Reply(body=json.dumps(body).encode())


def asked(tokenizer: Any, answer: Any, **changes: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    with chat_server(answer) as server:
        settings = server_of(server.url, **changes)
        with Session(settings, "answer.server") as session:
            generation = Generation("base", tokenizer, 64, 0, [tokenizer.eos_token_id])
            return ask_question(session, settings, generation, QUESTION, 0.0), server.requests


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (-TOLERANCE - 1, "it truncates prompts or applies another chat template"),
        (TOLERANCE + 1, "it adds a system prompt or applies another chat template"),
    ],
)
def test_a_prompt_of_another_length_stops_the_stage_at_its_first_request(tokenizer: Any, off: int, said: str) -> None:
    questions = make_questions(2)
    with chat_server(lambda request, _: reply("fine", prompt_tokens=ours(request) + off)) as server:
        settings = server_of(server.url, concurrency=8)

        def ours(request: dict[str, Any]) -> int:
            return len(our_prompt(settings, tokenizer, request["messages"]))

        with Session(settings, "answer.server") as session:
            generation = Generation("base", tokenizer, 64, 0, [2])
            with pytest.raises(UserError, match=f"^question 81, turn 1: the server counted .*{said}"):
                list(ask_questions(session, settings, generation, [(question, 0.0) for question in questions]))
        assert len(server.requests) == 1


@pytest.mark.parametrize("off", [-TOLERANCE, 0, TOLERANCE, None])
def test_a_few_tokens_more_or_less_are_none(tokenizer: Any, off: int | None) -> None:
    def answer(request: dict[str, Any], _: int) -> Reply:
        ours = len(our_prompt(server_of("http://127.0.0.1:9/v1"), tokenizer, request["messages"]))
        return reply("fine", prompt_tokens=None if off is None else ours + off)

    replies, requests = asked(tokenizer, answer)
    assert [found.text for found in replies] == ["fine", "fine"]
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("content", "thinking", "fields"),
    [
        ("", "keep", {"reasoning_content": "Hm."}),
        ("", "keep", {"reasoning": "Hm."}),
        ("<think>Hm, so", "strip", {}),
    ],
)
def test_thinking_without_an_answer_is_an_error_that_names_the_limit(
    tokenizer: Any, content: str, thinking: str, fields: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"thinking alone: answer\.max_new_tokens \(64\) ended it before the answer"):
        asked(tokenizer, lambda *_: reply(content, "length", **fields), thinking=thinking)


def test_thinking_is_taken_out_before_the_second_turn_and_judging(tokenizer: Any) -> None:
    text = "<think>4? [[10]]</think>\n\nFour."
    replies, requests = asked(tokenizer, lambda *_: reply(text), thinking="strip")
    assert [found.text for found in replies] == ["Four.", "Four."]
    assert requests[1]["messages"][1] == {"role": "assistant", "content": "Four."}
    kept, requests = asked(tokenizer, lambda *_: reply(text))
    assert requests[1]["messages"][1]["content"] == text
    assert kept[0].text == text


def test_thinking_can_be_switched_off_for_the_server_and_for_our_count(tokenizer: Any) -> None:
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    settings = server_of("http://127.0.0.1:9/v1", thinking="off", extra_body={"chat_template_kwargs": {"a": 1}})
    generation = Generation("base", tokenizer, 64, 0, [2])
    body = request_body(settings, generation, [], 0.0, 5)
    assert body["extra_body"]["chat_template_kwargs"] == {"a": 1, "enable_thinking": False}
    assert tokenizer.decode(our_prompt(settings, tokenizer, [{"role": "user", "content": "?"}])).endswith("</think>")
