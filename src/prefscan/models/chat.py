"""A conversation as text and as tokens under a tokenizer's own chat template: one way for pairs, answers and judges.

What a person, a model or a file wrote is text. The name of a control token in it, such as `<|im_end|>`, becomes the
tokens of its characters and neither ends nor opens a turn.
"""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from unittest.mock import patch

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from prefscan.common.errors import UserError

Message = dict[str, Any]
DATE = datetime(2024, 7, 26)  # the day of every template that writes one, as Llama 3.2's own default has it
CLOCK = "{% macro strftime_now(format) %}"
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Amber orchard"}],
    [
        {"role": "user", "content": "Amber orchard"},
        {"role": "assistant", "content": "Marble river"},
        {"role": "user", "content": "Silver meadow"},
    ],
)
ANSWERS = "Velvet harbour", "Copper lantern"  # words that no template has


def strings(value: Any) -> Iterator[str]:
    """Every text within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (str(key), *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def compact(text: str) -> str:
    """Without white space: templates trim texts and set them apart by lines."""
    return "".join(text.split())


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_generation: bool, tools: Any = None
) -> str:
    """The template's rendering; raises UserError where it refuses the conversation."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=for_generation, tokenize=False
            )
        )
    except (TemplateError, TypeError, ValueError) as error:  # for instance a template without a system turn
        raise UserError(f"the chat template refuses the conversation ({' '.join(str(error).split())})") from None


def left_out(messages: Sequence[Message], tools: Any, rendering: str) -> str | None:
    """What of a conversation is not in its rendering, in words; white space does not count."""
    found = compact(rendering)

    def is_there(text: str) -> bool:
        return compact(text) in found or compact(json.dumps(text, ensure_ascii=False)[1:-1]) in found

    for message in messages:
        role = message["role"]
        if not is_there(message["content"] or ""):
            return f"the {role}'s text {message['content']!r:.60}"
        if not is_there(message.get("reasoning_content") or ""):
            return f"reasoning_content of the {role}'s turn"
        for call in message.get("tool_calls") or ():
            call = call.get("function", call)
            values = call.get("arguments") if isinstance(call, dict) else None
            if isinstance(values, str) and not is_there(values):  # JSON text, which a template may write in another way
                try:
                    values = json.loads(values)
                except ValueError:
                    return f"tool_calls of the {role}'s turn"
            if not all(map(is_there, (*strings(call.get("name")), *strings(values)))):
                return f"tool_calls of the {role}'s turn"
    for tool in tools or ():
        name = (tool["function"] if isinstance(tool.get("function"), dict) else tool).get("name")
        if not isinstance(name, str) or not is_there(name):
            return f"tools ({name})"
    return None


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_generation: bool, tools: Any = None
) -> str:
    """A conversation by the chat template; raises UserError where that refuses it or leaves out a part of it."""
    rendering = apply(tokenizer, messages, for_generation, tools)
    if part := left_out(messages, tools, rendering):
        raise UserError(f"the chat template leaves out {part}")
    return rendering


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    for_generation: bool,
    tools: Any = None,
    prefill: str = "",
) -> list[int]:
    """The tokens of `render`'s text and of the words that the model's turn begins with; none is added."""
    text = render(tokenizer, messages, for_generation, tools)
    ids: list[int] = tokenizer(text + prefill, add_special_tokens=False)["input_ids"]
    control = control_names(tokenizer)
    if not any(map(control.search, strings([list(messages), tools]))):
        return ids
    try:
        safe: Any = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            add_generation_prompt=for_generation,
            return_dict=False,
            sanitize_control_tokens=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"a text has the name of a control token, and the tokenizer cannot take it as text "
            f"({' '.join(str(error).split())})"
        ) from None
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*safe, *ids[len(plain) :]]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message], tools: Any = None, prefill: str = ""
) -> list[int]:
    """The conversation up to where the model's turn begins, and the words that the turn begins with."""
    return chat_ids(tokenizer, conversation, True, tools, prefill)


def control_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the name of a special token, and of another added one that the template writes, the longest first."""
    template = str(tokenizer.chat_template)
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in template)
    ]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def without_control(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text for a server that tokenises by itself: a zero-width space breaks each control token's name."""
    return control_names(tokenizer).sub(lambda found: f"{found[0][:1]}\u200b{found[0][1:]}", text)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token with which the template ends an assistant's turn; None where it ends with none."""
    answer = ANSWERS[0]
    _, said, tail = apply(tokenizer, [*PROBES[0], {"role": "assistant", "content": answer}], False).rpartition(answer)
    found = control_names(tokenizer).search(tail) if said else None
    return tokenizer.convert_tokens_to_ids(found[0]) if found else None  # type: ignore[return-value]


def freeze_date(tokenizer: Any) -> bool:
    """Give the template one day where it asks for today's; whether it did.

    In the template's own text, so that a server that loads the tokenizer has the same day.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template or CLOCK in template:
        return False
    formats = {found[2] for found in re.finditer(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)}

    class Recorder(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Recorder":
            return cls(DATE.year, DATE.month, DATE.day)

        def strftime(self, format: str) -> str:
            formats.add(format)
            return super().strftime(format)

    with patch.object(chat_template_utils, "datetime", Recorder):
        for probe in PROBES:
            for messages in (probe, [{"role": "system", "content": "Quiet garden"}, *probe]):
                try:
                    apply(tokenizer, messages, True)
                except UserError:  # as without a system turn; what matters is refused where it is used
                    continue
    days = json.dumps({format: DATE.strftime(format) for format in sorted(formats)}, ensure_ascii=False)
    tokenizer.chat_template = f"{CLOCK}{{{{ {days}[format] }}}}{{% endmacro %}}\n{template}"
    return True
