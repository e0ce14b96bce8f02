"""Chat completions of an OpenAI-compatible server, for one stage: retries, limits, and one breaker for all requests.

A request is tried again a number of times on time-outs, broken connections and server errors, and for minutes on rate
limits, which pass; with exponential back-off, and not before the server's Retry-After. What no retry mends ends the
stage: an empty account, a wrong key, a wait of hours. What comes with status 200 may still be anything: the client
checks no field. The key comes from an environment variable and goes nowhere else.
"""

import ipaddress
import json
import math
import os
import re
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from prefscan.common.config import Connection
from prefscan.common.errors import UserError
from prefscan.common.io import BAD_JSON
from prefscan.endpoints.workers import Breaker, NoReply

PASSING_STATUS = (408, 409, 429)  # request timeout, conflict, rate limit; and all from 500
STOPPING_STATUS = (401, 402, 404)  # a wrong key, an empty account, no such model or address: the same for every request
# The same by `code` or `type` of the error, whatever its status: OpenAI sends an empty account with a rate limit's.
STOPPING_CODE = re.compile(
    r"quota|billing|balance|credit|budget|arrear|deactivated|api_key|model_not_found", re.IGNORECASE
)
LONGEST_WAIT = 600.0  # seconds that a server may ask for; a stage that sleeps for hours looks like one that hangs
LIMITED = 900.0  # seconds from its first try in which a request that meets rate limits is tried again
NEVER_SENT = ("ConnectError", "ConnectTimeout")  # by name: which HTTP library openai uses depends on its version
WORDS = 200  # characters of a server's own words in an error
BYTES_A_TOKEN = 4  # of English text, to pace requests by tokens; servers estimate so too

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What a server replied: the first choice's text, and the tokens that it bills, None where it did not count.

    `served_by` is the model that it says it used, and its fingerprint; `finish` is why it ended: `stop`, `length` or
    another of OpenAI's reasons. `reasoned`: whether thinking came in a field of its own. `discount` is the part of the
    price that its way of asking saved.
    """

    text: str
    served_by: str
    input_tokens: int | None
    output_tokens: int | None
    finish: str | None = None
    refusal: str = ""
    reasoned: bool = False
    discount: float = 0.0

    @property
    def said(self) -> str:
        """The text without thinking; empty where the reply ended before it did."""
        return without_thinking(self.text)


class Fault(Exception):
    """One attempt that failed, and what follows: another attempt, none, or the end of the stage."""

    def __init__(self, reason: str, passing: bool = False, stops: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.stops = stops
        self.wait = wait  # seconds that the server asks for
        self.limited = False  # by a rate limit
        self.unreachable = False


class ErrorInReply(Exception):
    """A reply of status 200 that holds an error object, as gateways send it."""

    def __init__(self, error: Any) -> None:
        super().__init__()
        self.error = error


class Limits:
    """Requests and tokens of the last minute, held under the server's limits; None is no limit."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self.requests = requests
        self.tokens = tokens
        self.sent: deque[tuple[float, int]] = deque()
        self.lock = Lock()

    def _pause(self, tokens: int) -> float:
        """Seconds until the request fits; 0 and counted where it does now."""
        with self.lock:
            now = time.monotonic()
            while self.sent and self.sent[0][0] <= now - 60:
                self.sent.popleft()
            over = self.requests is not None and len(self.sent) >= self.requests
            if self.tokens is not None and self.sent:  # a request over the limit by itself goes alone
                over = over or sum(count for _, count in self.sent) + tokens > self.tokens
            if over:
                return self.sent[0][0] + 60 - now
            self.sent.append((now, tokens))
            return 0.0

    def wait(self, tokens: int, breaker: Breaker) -> None:
        if self.requests is None and self.tokens is None:
            return
        while pause := self._pause(tokens):
            breaker.wait(pause)


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_of(url: str) -> str | None:
    """The proxy of the environment through which the address is reached, without its password."""
    parts = urlsplit(url)
    if is_loopback(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return re.sub(r"//[^/@]*@", "//", proxy) if proxy else None


def make_client(server: Connection, section: str, base_url: str | None = None) -> openai.OpenAI:
    """A client with the key from the environment, or without one where `key_variable` is None.

    A server on this machine is never asked through a proxy. Raises UserError, which names the parameter in `section`,
    when the environment variable holds no key, or one that no request can carry.
    """
    key = os.environ.get(server.key_variable) if server.key_variable else "none"
    if not key:
        raise UserError(
            f"{section}.key_variable: the environment has no {server.key_variable}; export it, or choose what needs no "
            "key: `dvc exp run -S judge=local -S answer=laptop`"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{section}.key_variable: {server.key_variable} holds a line end or a typographic sign; export it again"
        )
    address = base_url or server.base_url or os.environ.get("OPENAI_BASE_URL")  # as the client does
    return openai.OpenAI(
        api_key=key,
        base_url=address,
        timeout=server.timeout,
        max_retries=0,  # tenacity does the retrying, so that attempts are counted in one place
        default_headers=dict(server.headers),
        default_query=dict(server.query),
        http_client=openai.DefaultHttpxClient(trust_env=False) if address and is_loopback(address) else None,
    )


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
    return 0.0 if math.isnan(seconds) else max(seconds, 0.0)


def may_be_billed(error: BaseException) -> bool:
    """Whether the server may have computed a reply that never arrived whole: a time-out, a connection that broke."""
    return isinstance(error, openai.APIConnectionError) and type(error.__cause__).__name__ not in NEVER_SENT


def words_in(body: Any, key: str) -> str:
    """What an error body of any shape says, in one line, without the key; or nothing."""
    said = body
    while isinstance(said, (dict, list)) and said:
        if isinstance(said, list):
            said = said[0]
        else:
            names = ("message", "detail", "error", "msg", "errors", "title", "reason", "description")
            said = next((said[name] for name in names if said.get(name)), json.dumps(said, ensure_ascii=False))
    return " ".join(said.replace(key, "…").split())[:WORDS] if isinstance(said, str) else ""


def codes_in(body: Any) -> list[str]:
    """`code`, `type` and `status` of an error object, as text."""
    return [str(body[name]) for name in ("code", "type", "status") if body.get(name)] if isinstance(body, dict) else []


def status_of(codes: list[str]) -> int:
    """The status that an error object inside a reply of status 200 stands for; 400, which is final, for any other."""
    for code in codes:
        if re.fullmatch(r"[45]\d\d", code):
            return int(code)
    names = " ".join(codes).lower()
    if re.search(r"rate_?limit|too_many", names):
        return 429
    return 500 if re.search(r"server_error|overloaded|unavailable|timeout|internal|capacity", names) else 400


def counted(found: Any) -> tuple[int, int] | None:
    """The tokens of prompt and reply that a server bills; None where it did not say both in whole numbers.

    Some count the thinking in `total_tokens` alone, so what the reply costs is the larger of both counts.
    """
    usage = getattr(found, "usage", None)
    prompt, reply, total = (
        getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    if not (isinstance(prompt, int) and isinstance(reply, int) and prompt >= 0 and reply >= 0):
        return None
    return prompt, max(reply, total - prompt) if isinstance(total, int) else reply


def without_thinking(text: str) -> str:
    """What follows the last </think>, which a template may have opened in the prompt; nothing of endless thinking."""
    _, end, rest = text.rpartition("</think>")
    if not end and text.lstrip().startswith("<think>"):
        return ""
    return rest.strip() if end else text


def check_errors(found: Any) -> None:
    """Raises ErrorInReply for a completion that holds an error object in place of a choice, or in it."""
    choices = getattr(found, "choices", None)
    for part in (found, choices[0] if isinstance(choices, list) and choices else None):
        if error := getattr(part, "error", None):
            raise ErrorInReply(error)


def reply_of(found: Any) -> Reply:
    """The first choice of a completion; raises NoReply where there is none to use."""
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
    refusal = getattr(message, "refusal", None)
    return Reply(
        # Half a character, as a limit of tokens may leave it, cannot be written.
        text.encode(errors="replace").decode(),
        " ".join(part for part in (found.model, found.system_fingerprint) if isinstance(part, str) and part),
        tokens and tokens[0],
        tokens and tokens[1],
        getattr(choice, "finish_reason", None),
        " ".join(refusal.encode(errors="replace").decode().split())[:WORDS] if isinstance(refusal, str) else "",
        bool(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)),
    )


class Session:
    """One server for one stage: the client, the limits a minute and the breaker that all its requests share.

    `section` is the part of params.yaml that describes the server; `base_url` stands in for one that it lacks.
    """

    def __init__(self, server: Connection, section: str, base_url: str | None = None) -> None:
        self.server = server
        self.section = section
        self.client = make_client(server, section, base_url)
        self.breaker = Breaker()
        self.limits = Limits(server.requests_per_minute, server.tokens_per_minute)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    @property
    def address(self) -> str:
        url = str(self.client.base_url).rstrip("/")
        proxy = proxy_of(url)
        return f"{url} through the proxy {proxy}" if proxy else url

    def fault(self, error: BaseException) -> Fault:
        """What an attempt's error means for the next one."""
        key = self.client.api_key
        if isinstance(error, (openai.APIStatusError, ErrorInReply)):
            body = error.body if isinstance(error, openai.APIStatusError) else error.error
            codes, words = codes_in(body), words_in(body, key)
            if isinstance(error, ErrorInReply):
                status = status_of(codes)
                said = f"the server answered 200 with an error ({': '.join(filter(None, [*codes[:1], words]))})"
            else:
                status = error.status_code
                said = f"the server answered {status} ({type(error).__name__}{f': {words}' if words else ''})"
            wait = retry_after(error)
            stops = status in STOPPING_STATUS or any(STOPPING_CODE.search(code) for code in codes)
            if wait > LONGEST_WAIT:
                stops = True
                said += f" and asks to wait {wait:.0f} s, over {LONGEST_WAIT:.0f} s"
            found = Fault(said, not stops and (status in PASSING_STATUS or status >= 500), stops, wait)
            found.limited = status == 429
            return found
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            words = f": {' '.join(str(cause).replace(key, '…').split())[:WORDS]}" if cause and str(cause) else ""
            found = Fault(f"({type(error).__name__}) at {self.address}{words}", passing=True)
            found.unreachable = type(cause).__name__ in NEVER_SENT
            return found
        if isinstance(error, BAD_JSON):
            return Fault("the server sent no chat completion; check its base_url")
        return Fault(f"the request failed ({type(error).__name__})")

    def call(self, send: Callable[[], T], tokens: int = 0) -> T:
        """What `send` gives, tried again where the fault may pass; `tokens` are what it takes of the limit a minute.

        Raises NoReply with the reason where it gives nothing. A fault that the stage's other requests would meet, and
        waiting that is used up, end them too.
        """
        backoff = wait_random_exponential(multiplier=0.5, max=60)

        def attempt() -> T:
            self.limits.wait(tokens, self.breaker)
            self.breaker.check()
            try:
                return send()
            except (openai.OpenAIError, ErrorInReply, *BAD_JSON) as error:
                raise self.fault(error) from error

        def fault_in(state: RetryCallState) -> Fault | None:
            error = state.outcome.exception() if state.outcome else None
            return error if isinstance(error, Fault) else None

        def wait(state: RetryCallState) -> float:
            fault = fault_in(state)
            return max(backoff(state), fault.wait if fault else 0.0)

        def stop(state: RetryCallState) -> bool:
            fault = fault_in(state)
            if fault and fault.limited:
                return time.monotonic() - state.start_time + wait(state) > LIMITED
            return state.attempt_number >= self.server.attempts

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Fault) and error.passing),
            stop=stop,
            wait=wait,
            sleep=self.breaker.wait,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except Fault as fault:
            reason = str(fault)
            if reason.startswith("("):
                reason = f"the request failed {self.server.attempts} times {reason}"
            if fault.stops or fault.limited or fault.unreachable:
                self.breaker.trip(reason)
            elif fault.passing:
                self.breaker.strike(reason)
            raise NoReply(reason, passing=fault.passing or fault.stops, stops=fault.stops) from None

    def complete(self, body: dict[str, Any], send: Callable[[], Any] | None = None) -> Reply:
        """The reply to one request, by `send` where its caller counts money; raises NoReply as `call` does."""

        def plain() -> Any:
            found = self.client.chat.completions.create(**body)
            check_errors(found)
            return found

        text = sum(len(message["content"].encode()) for message in body["messages"])
        most = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        return reply_of(self.call(send or plain, text // BYTES_A_TOKEN + most))
