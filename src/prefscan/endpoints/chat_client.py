"""Chat completions of an OpenAI-compatible server: one request, tried again where the fault may pass.

A request is tried again a number of times on time-outs, broken connections and server errors, and for minutes on rate
limits, which pass; with exponential back-off, and not before the server's Retry-After. What comes with status 200 may
still be anything: the client checks no field. The key comes from an environment variable and goes nowhere else.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from prefscan.common.errors import UserError
from prefscan.common.io import BAD_JSON

PASSING = (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError)
PASSING_STATUS = (408, 409)  # request timeout, conflict
LONGEST_WAIT = 600.0  # seconds that a server may ask for; a stage that sleeps for hours looks like one that hangs
LIMITED = 900.0  # seconds from its first try in which a request that meets rate limits is tried again
NEVER_SENT = ("ConnectError", "ConnectTimeout")  # by name: which HTTP library openai uses depends on its version


@dataclass(frozen=True)
class Reply:
    """What a server replied: the first choice's text, and the tokens that it counted, None where it did not.

    `served_by` is the model that it says it used, and its fingerprint; `finish` is why it ended: `stop`, `length` or
    another of OpenAI's reasons.
    """

    text: str
    served_by: str
    input_tokens: int | None
    output_tokens: int | None
    finish: str | None = None


class NoReply(Exception):
    """A request without a reply to use: the text is the reason, without key or prompt."""


def make_client(base_url: str | None, key_variable: str | None, timeout: float, section: str) -> openai.OpenAI:
    """A client with the key from the environment, or without one where `key_variable` is None.

    Raises UserError, which names the parameter in `section`, when the environment variable holds no key, or one that no
    request can carry.
    """
    key = os.environ.get(key_variable) if key_variable else "none"
    if not key:
        raise UserError(
            f"{section}.key_variable: the environment has no {key_variable}; export it, or choose what needs no key: "
            "`dvc exp run -S judge=local -S answer=laptop`"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{section}.key_variable: {key_variable} holds a line end or a typographic sign; export it again"
        )
    # Tenacity does the retrying, so that attempts are counted in one place.
    return openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=0)


def retry_after(error: BaseException | None) -> float:
    """The seconds that the server asked to wait, as a number or until a date (RFC 9110, 10.2.3); 0 when it did not.

    OpenAI and Azure also send retry-after-ms, in milliseconds, which is finer and goes first.
    """
    headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    milliseconds, header = headers.get("retry-after-ms"), headers.get("retry-after", "")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_WAIT)


def may_be_billed(error: BaseException) -> bool:
    """Whether the server may have computed a reply that never arrived whole: a time-out, a connection that broke."""
    return isinstance(error, openai.APIConnectionError) and type(error.__cause__).__name__ not in NEVER_SENT


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later; OpenAI sends the status of a rate limit for an empty account too."""
    if isinstance(error, openai.APIStatusError):
        passing = isinstance(error, PASSING) or error.status_code in PASSING_STATUS
        return passing and error.code != "insufficient_quota"
    return isinstance(error, PASSING)


def words_of(error: openai.APIStatusError, key: str) -> str:
    """What the server says is wrong, in one line of up to 200 characters, without the key; or nothing."""
    said = error.body.get("message") if isinstance(error.body, dict) else error.body
    return " ".join(said.replace(key, "…").split())[:200] if isinstance(said, str) else ""


def counted(found: Any) -> tuple[int, int] | None:
    """The tokens of prompt and reply that a server counted; None where it did not say both in whole numbers."""
    usage = getattr(found, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    return counts if all(isinstance(count, int) and count >= 0 for count in counts) else None  # type: ignore[return-value]


def complete(send: Callable[[], Any], attempts: int, key: str) -> Reply:
    """The reply to one request, which `send` makes; raises NoReply with the reason where there is none to use."""
    backoff = wait_random_exponential(multiplier=0.5, max=60)

    def wait(state: RetryCallState) -> float:
        return max(backoff(state), retry_after(state.outcome.exception() if state.outcome else None))

    def stop(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, openai.RateLimitError):
            return time.monotonic() - state.start_time + wait(state) > LIMITED
        return state.attempt_number >= attempts

    retrying = Retrying(retry=retry_if_exception(passes), stop=stop, wait=wait, reraise=True)
    try:
        found = retrying(send)
    except openai.APIStatusError as error:
        words = words_of(error, key)
        raise NoReply(
            f"the server answered {error.status_code} ({type(error).__name__}{f': {words}' if words else ''})"
        ) from None
    except openai.OpenAIError as error:
        raise NoReply(f"the request failed {attempts} times ({type(error).__name__})") from None
    except BAD_JSON:
        found = None
    if not isinstance(found, ChatCompletion):
        raise NoReply("the server sent no chat completion; check its base_url")
    choice = found.choices[0] if isinstance(found.choices, list) and found.choices else None
    message = getattr(choice, "message", None)
    if not message:
        raise NoReply("the server sent an empty reply")
    text = getattr(message, "content", None) or ""
    if not isinstance(text, str):
        raise NoReply(f"the server sent a reply that is no text but {type(text).__name__}")
    tokens = counted(found)
    return Reply(
        # Half a character, as a limit of tokens may leave it, cannot be written.
        text.encode(errors="replace").decode(),
        " ".join(part for part in (found.model, found.system_fingerprint) if isinstance(part, str) and part),
        tokens and tokens[0],
        tokens and tokens[1],
        getattr(choice, "finish_reason", None),
    )
