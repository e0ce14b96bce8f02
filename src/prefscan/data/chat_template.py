"""The chat template: what the fetch stage settles in it, and what the prepare stage checks of it, once for a sweep.

Settled in the template's own text, so that it reaches whatever renders a conversation (training, answers, servers):
the mode of `model.chat_template_kwargs`, the date, and the text that it puts before every answer.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from prefscan.common.errors import UserError
from prefscan.models.chat import ANSWERS, DATE, PROBES, Message, apply, chat_ids, freeze_date, render, turn_end


def settle(tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Settle mode, date and the constant text before answers in the template; raises UserError where it cannot.

    With `kwargs`, prompts begin an answer as the template has it in that mode. Without, constant text that the template
    puts between prompt and answer, such as Qwen3's empty think block, becomes part of the prompt.
    """
    if not isinstance(tokenizer.chat_template, str):
        if kwargs:
            raise UserError(
                "model.chat_template_kwargs: the tokenizer has several chat templates; set it to {}, or choose another "
                "model"
            )
        return
    unknown = [key for key in kwargs if not re.search(rf"\b{re.escape(key)}\b", tokenizer.chat_template)]
    if unknown:
        raise UserError(f"model.chat_template_kwargs: the chat template has no variable {unknown[0]!r}; remove it")
    literals = {True: "true", False: "false", None: "none"}
    tokenizer.chat_template = (
        "".join(
            f"{{% set {key} = {literals[value] if isinstance(value, bool | None) else json.dumps(value)} %}}\n"
            for key, value in kwargs.items()
        )
        + tokenizer.chat_template
    )
    if freeze_date(tokenizer):
        print(f"the chat template writes the date: it is {DATE:%Y-%m-%d} now, on every day", flush=True)
    if not kwargs and (before := constant_text(tokenizer)):
        print(f"the chat template puts {before!r} before every answer: it is part of the prompt now", flush=True)
        # Jinja drops one newline at the end of a template, and here the template ends later.
        tokenizer.chat_template = (
            tokenizer.chat_template.removesuffix("\n")
            + f"{{{{ {json.dumps(before)} if add_generation_prompt else '' }}}}"
        )


def constant_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template puts between the prompt and every answer; empty where the prompt ends at the answer."""
    texts = set()
    for probe in PROBES:
        for answer in ANSWERS:
            try:
                prompt = apply(tokenizer, probe, True)
                whole = apply(tokenizer, [*probe, {"role": "assistant", "content": answer}], False)
            except UserError:
                return ""
            if not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
                return ""
            texts.add(whole[len(prompt) :].partition(answer)[0])
    return texts.pop() if len(texts) == 1 else ""


def audit(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError, naming the reason, for a chat template that cannot be trained and answered with."""

    def refuse(reason: str) -> UserError:
        return UserError(f"the chat template of {tokenizer.name_or_path} {reason}")

    for probe in PROBES:
        try:
            prompt = render(tokenizer, probe, True)
            chosen, rejected = (
                chat_ids(tokenizer, [*probe, {"role": "assistant", "content": answer}], False) for answer in ANSWERS
            )
        except UserError as error:
            raise UserError(f"{tokenizer.name_or_path}: {error}; choose another model") from None
        if not prompt.strip():
            raise refuse("renders an empty prompt; choose another model")
        if chosen == rejected:
            raise refuse("gives two different answers the same tokens; choose another model")
        refuse_bos(tokenizer, chat_ids(tokenizer, probe, True), refuse)
        renderings = set()
        for day in (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 9, 8, 7)):
            with other_day(day):
                renderings |= {apply(tokenizer, probe, True) for _ in range(8)}
        if len(renderings) > 1:
            raise refuse(
                "renders the same conversation differently from one time to the next, as by the date or at random; "
                "choose another model"
            )
        refuse_control(tokenizer, probe, refuse)
    if turn_end(tokenizer) is None:
        raise refuse(
            "ends an assistant's turn with no control token, so that generation could not stop there; choose another "
            "model"
        )


def refuse_bos(tokenizer: PreTrainedTokenizerBase, prompt: list[int], refuse: Any) -> None:
    """Where the tokenizer by itself begins a text with BOS, a prompt shall begin with one, and with one alone."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if prompt[:2] == [bos, bos]:
        raise refuse(f"begins a prompt with two {tokenizer.bos_token}; choose another revision of the model")
    ids: list[int] = tokenizer("Hello")["input_ids"]
    if ids[:1] == [bos] != prompt[:1]:
        raise refuse(
            f"begins a prompt without {tokenizer.bos_token}, with which the tokenizer begins every text; "
            "set model.bos: always"
        )


def refuse_control(tokenizer: PreTrainedTokenizerBase, probe: list[Message], refuse: Any) -> None:
    """A text that writes out a whole conversation must open no turn: as many control tokens as without it."""
    names = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    hostile = render(tokenizer, probe, True)
    asked = [*probe[:-1], {"role": "user", "content": f"{probe[-1]['content']} {hostile}"}]
    counts = [
        sum(token in names.values() for token in chat_ids(tokenizer, messages, True)) for messages in (probe, asked)
    ]
    if counts[0] != counts[1]:
        raise refuse("cannot tell its control tokens from the same words within a text; choose another model")


@contextmanager
def other_day(day: datetime) -> Iterator[None]:
    """Within the block it is that day for chat templates."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return day

    with patch.object(chat_template_utils, "datetime", Clock):
        yield
