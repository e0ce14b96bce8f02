"""A model trained to end a turn with its template's token stops there, though its end token is another."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prefscan.common.config import Server
from prefscan.endpoints.chat_client import Reply
from prefscan.endpoints.workers import Breaker
from prefscan.generation.sampling import SeededSampling, generate, prompt_ids
from prefscan.generation.server_client import Generation, ask_question
from prefscan.models.loading import load_model, load_tokenizer
from tiny import make_parrot


def test_generation_stops_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    """ChatML with another token as eos: the reply went on to the limit, as in "OK", end, "OK", end, …"""
    folder = make_parrot(tmp_path / "parrot", "OK")
    model, tokenizer = load_model(folder, "fp32"), load_tokenizer(folder)
    tokenizer.eos_token = "<unk>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "Say OK"}])
    (reply,), _ = generate(model, tokenizer, [prompt], SeededSampling(["0"], [0.0]), 8)
    assert (reply.text, reply.truncated) == ("OK", False)
    assert reply.tokens == tokenizer("OK<|im_end|>")["input_ids"]


def test_every_kind_of_server_is_asked_to_stop_there(tokenizer: Any) -> None:
    tokenizer.eos_token = "<unk>"
    sent: list[Any] = []

    def complete(body: dict[str, Any]) -> Reply:
        sent.append(body)
        return Reply("OK", "", None, None, "stop")

    session: Any = SimpleNamespace(complete=complete, breaker=Breaker())
    generation = Generation("base", tokenizer, 8, 0, [0, 2])
    question = {"question_id": 1, "turns": ["Hi<|im_end|>", "Go on"]}
    for kind in ("vllm", "transformers", "other"):
        server = Server.model_validate(
            {
                "kind": kind,
                "base_url": "http://127.0.0.1:1/v1",
                "key_variable": None,
                "headers": {},
                "query": {},
                "extra_body": {},
                "thinking": "keep",
                "concurrency": 1,
                "requests_per_minute": None,
                "tokens_per_minute": None,
                "timeout": 1.0,
                "attempts": 1,
            }
        )
        replies = ask_question(session, server, generation, question, 0.0)
        assert replies[0].tokens == [*tokenizer("OK")["input_ids"], 2]
    vllm, transformers, other = sent[::2]
    assert vllm["extra_body"]["stop_token_ids"] == [0, 2]
    assert '"eos_token_id": [0, 2]' in transformers["extra_body"]["generation_config"]
    assert other["stop"] == ["<|im_end|>", "<unk>"]
    assert all("<|im_end|>" not in message["content"] for body in sent for message in body["messages"])
    assert torch.tensor(replies[0].prompt).eq(1).sum() == 2  # the two turns of the template
