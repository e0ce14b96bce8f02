"""Replies by an OpenAI-compatible server: the turns of a question in order, several questions at once.

The server applies the chat template and ends a turn at its end tokens. It sends text, so tokens are the text's by the
model's tokenizer, with the end token where the limit did not cut it; their log-probabilities are computed afterwards.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import openai
from transformers import PreTrainedTokenizerBase

from prefscan.common.config import Server
from prefscan.common.errors import UserError
from prefscan.endpoints.chat_client import Reply as ServerReply
from prefscan.endpoints.chat_client import Session
from prefscan.endpoints.server import served_name
from prefscan.endpoints.workers import NoReply, at_once
from prefscan.generation.sampling import GREEDY_BELOW, Reply
from prefscan.models.chat import turn_end, without_control

TOLERANCE = 4  # tokens by which a server's count of a prompt may differ from ours: a second <bos>, an end of turn
NO_THINKING = {"enable_thinking": False}  # the name that Qwen3's template has and others took over


def request_seed(seed: int, question: int, turn: int) -> int:
    """A seed for one reply, so that no reply depends on which were asked for before it; below 2³¹."""
    digest = hashlib.sha256(f"{seed}/{question}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Generation:
    """How replies are generated, whatever the question: which model, up to how many tokens, from which seed.

    `ends` are the tokens that end a turn.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    seed: int
    ends: list[int]

    @cached_property
    def end(self) -> list[int]:
        """A server does not say which end token it met: the one that the template ends a turn with."""
        likely = (turn_end(self.tokenizer), self.tokenizer.eos_token_id, *self.ends)
        return [token for token in likely if token in self.ends][:1]


def request_body(
    server: Server, generation: Generation, conversation: list[dict[str, str]], temperature: float, seed: int
) -> dict[str, Any]:
    """A chat completion's body: sampling from all tokens at MT-Bench's temperature, whatever the server's defaults.

    What is not in OpenAI's schema goes into `extra_body`, in the words of each kind of server.
    """
    greedy, ends = temperature < GREEDY_BELOW, generation.ends
    body: dict[str, Any] = {
        "model": generation.model,
        "messages": list(conversation),
        "temperature": 0.0 if greedy else temperature,
        "top_p": 1.0,
        "max_tokens": generation.max_new_tokens,
        "seed": seed,
    }
    extra: dict[str, Any] = {}
    if server.kind == "vllm":
        extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": ends}
    elif server.kind == "transformers":
        # What is left out it takes from the model's own generation config.
        plain: dict[str, Any] = {
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "min_new_tokens": 0,
        }
        plain |= {"do_sample": not greedy, "top_k": 0, "eos_token_id": ends, "pad_token_id": ends[0]}
        extra = {"generation_config": json.dumps(plain)}
    elif server.kind == "other":  # OpenAI's schema has no tokens, and at most 4 texts, at which to stop
        names = generation.tokenizer.convert_ids_to_tokens(list(dict.fromkeys([*generation.end, *ends])))
        body["stop"] = [str(name) for name in names][:4]
    extra |= server.extra_body
    if server.thinking == "off":
        extra["chat_template_kwargs"] = extra.get("chat_template_kwargs", {}) | NO_THINKING
    return body | ({"extra_body": extra} if extra else {})


def name_at_server(session: Session, server: Server, key: str) -> str:
    """The name under which a server that the stage did not start has these weights.

    That is `served_name` at one of prefscan serve, which the list of its models shows, and the key at any other.
    Raises UserError when the server cannot be reached, and when it is prefscan serve's and has other weights.
    """
    if server.kind == "transformers":  # it lists what it finds in the hub's cache
        return key
    try:
        models = session.client.with_options(max_retries=server.attempts - 1).models.list()
        served = {str(getattr(model, "id", "")) for model in getattr(models, "data", None) or ()}
    except openai.APIConnectionError as error:
        raise UserError(
            f"answer.server.base_url: {session.address} cannot be reached ({type(error).__name__}); start the server, "
            "or correct the address"
        ) from None
    except (openai.APIError, ValueError):  # none of ours: it has no list, or one of another kind
        served = set()
    wanted = served_name(key)
    if wanted in served:
        return wanted
    if any(name.startswith("base@") for name in served):
        raise UserError(
            f"answer.server.base_url: {server.base_url} does not serve {wanted}, the weights as they are now: "
            "it was started before they changed; restart `prefscan serve`"
        )
    return key


def our_prompt(server: Server, tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]]) -> list[int]:
    """The conversation by the tokenizer's chat template, with what the request tells the server's template."""
    told = server.extra_body.get("chat_template_kwargs", {}) | (NO_THINKING if server.thinking == "off" else {})
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **told)
    ids: list[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return ids


def check_prompt(counted: int | None, ours: int) -> None:
    """Raises NoReply where the server counted another number of tokens in a prompt than we do."""
    if not counted or abs(counted - ours) <= TOLERANCE:
        return
    if counted < ours:
        what = "it truncates prompts or applies another chat template; raise its context length, or check its template"
    else:
        what = "it adds a system prompt or applies another chat template; take out the first, or check its template"
    raise NoReply(f"the server counted {counted} tokens in a prompt of {ours}: {what}", stops=True)


def check_reply(found: ServerReply, server: Server, limit: int) -> str:
    """The text that is the answer; raises NoReply where the server ended it in another way than the model or the limit.

    With `thinking: strip`, the thinking in it is taken out.
    """
    if found.refusal or found.finish not in ("stop", "length"):
        said = f": {found.refusal}" if found.refusal else ""
        raise NoReply(
            f"the server ended the reply with {found.finish!r}{said}, which is neither an end nor answer.max_new_tokens"
        )
    text = found.said if server.thinking == "strip" else found.text
    if not text.strip() and (found.reasoned or (server.thinking == "strip" and found.text.strip())):
        raise NoReply(
            f"the reply is thinking alone: answer.max_new_tokens ({limit}) ended it before the answer; raise it, or "
            "set answer.server.thinking: off"
        )
    return text


def ask_question(
    session: Session, server: Server, generation: Generation, question: Any, temperature: float
) -> list[Reply]:
    """The replies of all turns; raises UserError where the server gives none, for no fault may become an answer."""
    conversation: list[dict[str, str]] = []
    replies = []
    tokenizer = generation.tokenizer
    for turn, text in enumerate(question["turns"]):
        conversation.append({"role": "user", "content": without_control(tokenizer, text)})
        number = request_seed(generation.seed, question["question_id"], turn)
        prompt = our_prompt(server, tokenizer, conversation)
        started = time.perf_counter()
        try:
            found = session.complete(request_body(server, generation, conversation, temperature, number))
            check_prompt(found.input_tokens, len(prompt))
            answer = check_reply(found, server, generation.max_new_tokens)
        except NoReply as fault:
            raise UserError(
                f"question {question['question_id']}, turn {turn + 1}: {fault}; what is answered is kept: see to the "
                "server of answer.server, and run `dvc repro` again"
            ) from None
        session.breaker.clear()
        truncated = found.finish == "length"
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + ([] if truncated else generation.end)
        said = answer.strip()
        replies.append(Reply(said, prompt, tokens or generation.end, [], truncated, time.perf_counter() - started))
        conversation.append({"role": "assistant", "content": without_control(tokenizer, said)})
    return replies


def ask_questions(
    session: Session, server: Server, generation: Generation, questions: list[tuple[Any, float]]
) -> Iterator[tuple[Any, list[Reply]]]:
    """Each question, given with its temperature, and its replies as they come; after an error no more are asked.

    Replies whose questions were under way at an error still come, before it is raised: none is computed in vain.
    """

    def ask(item: tuple[Any, float]) -> list[Reply] | None:
        if faults:
            return None
        question, temperature = item
        try:
            return ask_question(session, server, generation, question, temperature)
        except UserError as fault:
            faults.append(fault)
            return None

    faults: list[UserError] = []

    for (question, _), replies in at_once(ask, questions, server.concurrency, session.breaker):
        if replies is not None:
            yield question, replies
    if faults:
        raise faults[0]
