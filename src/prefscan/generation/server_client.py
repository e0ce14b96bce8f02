"""Replies by an OpenAI-compatible server: both turns of a question in order, several questions at once.

The server applies the chat template and ends a turn at its end tokens. It sends text, so tokens are the text's by the
model's tokenizer, with the end token where the limit did not cut it; their log-probabilities are computed afterwards.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from threading import Event
from typing import Any

import openai
from transformers import PreTrainedTokenizerBase

from prefscan.common.config import Server
from prefscan.common.errors import UserError
from prefscan.endpoints.chat_client import NoReply, complete
from prefscan.endpoints.server import served_name
from prefscan.generation.sampling import GREEDY_BELOW, Reply
from prefscan.models.chat import prompt_ids, turn_end, without_control


def request_seed(seed: int, question: int, turn: int) -> int:
    """A seed for one reply, so that no reply depends on which were asked for before it; below 2³¹."""
    digest = hashlib.sha256(f"{seed}/{question}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def request_body(
    server: Server,
    model: str,
    conversation: list[dict[str, str]],
    temperature: float,
    max_new_tokens: int,
    seed: int,
    ends: list[int],
) -> dict[str, Any]:
    """A chat completion's body: sampling from all tokens at MT-Bench's temperature, whatever the server's defaults.

    What is not in OpenAI's schema goes into `extra_body`, in the words of each kind of server.
    """
    greedy = temperature < GREEDY_BELOW
    body: dict[str, Any] = {
        "model": model,
        "messages": conversation,
        "temperature": 0.0 if greedy else temperature,
        "top_p": 1.0,
        "max_tokens": max_new_tokens,
        "seed": seed,
    }
    if server.kind == "vllm":
        body["extra_body"] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": ends}
    elif server.kind == "transformers":
        # What is left out it takes from the model's own generation config.
        plain: dict[str, Any] = {
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "min_new_tokens": 0,
        }
        plain |= {"do_sample": not greedy, "top_k": 0, "eos_token_id": ends, "pad_token_id": ends[0]}
        body["extra_body"] = {"generation_config": json.dumps(plain)}
    return body


def name_at_server(client: openai.OpenAI, server: Server, key: str) -> str:
    """The name under which a server that the stage did not start has these weights.

    That is `served_name` at one of prefscan serve, which the list of its models shows, and the key at any other.
    Raises UserError when the server cannot be reached, and when it is prefscan serve's and has other weights.
    """
    if server.kind == "transformers":  # it lists what it finds in the hub's cache
        return key
    try:
        models = client.with_options(max_retries=server.attempts - 1).models.list()
        served = {str(getattr(model, "id", "")) for model in getattr(models, "data", None) or ()}
    except openai.APIConnectionError as error:
        raise UserError(
            f"answer.server.base_url: {server.base_url} cannot be reached ({type(error).__name__}); start the server, "
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


def ask_question(
    client: openai.OpenAI,
    server: Server,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    question: Any,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    ends: list[int],
) -> list[Reply]:
    """The replies of both turns; raises UserError where the server gives none, for no fault may become an answer."""
    conversation: list[dict[str, str]] = []
    replies = []
    # A server does not say which end token it met: the one that the template ends a turn with.
    end = [token for token in (turn_end(tokenizer), tokenizer.eos_token_id, *ends) if token in ends][:1]
    for turn, text in enumerate(question["turns"]):
        conversation.append({"role": "user", "content": without_control(tokenizer, text)})
        number = request_seed(seed, question["question_id"], turn)
        body = request_body(server, model, conversation, temperature, max_new_tokens, number, ends)
        if server.kind == "other":  # OpenAI's schema has no tokens, and at most 4 texts, at which to stop
            body["stop"] = [str(tokenizer.convert_ids_to_tokens(token)) for token in dict.fromkeys([*end, *ends])][:4]
        started = time.perf_counter()
        try:
            found = complete(partial(client.chat.completions.create, **body), server.attempts, client.api_key)
        except NoReply as fault:
            raise UserError(
                f"question {question['question_id']}, turn {turn + 1}: {fault}; what is answered is kept: see to the "
                "server of answer.server, and run `dvc repro` again"
            ) from None
        if found.finish not in ("stop", "length"):
            raise UserError(
                f"question {question['question_id']}, turn {turn + 1}: the server ended the reply with "
                f"{found.finish!r}, which is neither an end nor answer.max_new_tokens; see to the server"
            )
        cut = found.finish == "length"
        tokens = tokenizer(found.text, add_special_tokens=False)["input_ids"] + ([] if cut else end)
        prompt = prompt_ids(tokenizer, conversation)
        said = found.text.strip()
        replies.append(Reply(said, prompt, tokens or end, [], cut, time.perf_counter() - started))
        conversation.append({"role": "assistant", "content": without_control(tokenizer, said)})
    return replies


def ask_questions(
    client: openai.OpenAI,
    server: Server,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[tuple[Any, float]],
    max_new_tokens: int,
    seed: int,
    ends: list[int],
) -> Iterator[tuple[Any, list[Reply]]]:
    """Each question, given with its temperature, and its replies as they come; after an error no more are asked.

    Replies whose questions were under way at an error still come, before it is raised: none is computed in vain.
    """
    pool, failed = ThreadPoolExecutor(server.concurrency), Event()

    def ask(question: Any, temperature: float) -> list[Reply] | None:
        if failed.is_set():
            return None
        try:
            return ask_question(client, server, model, tokenizer, question, temperature, max_new_tokens, seed, ends)
        except UserError:
            failed.set()
            raise

    futures = {pool.submit(ask, question, temperature): question for question, temperature in questions}
    fault: UserError | None = None
    try:
        for future in as_completed(futures):
            try:
                replies = future.result()
            except UserError as error:
                fault = fault or error
            else:
                if replies is not None:
                    yield futures[future], replies
    finally:
        pool.shutdown(cancel_futures=True)
    if fault:
        raise fault
