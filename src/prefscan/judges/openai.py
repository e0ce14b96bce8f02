"""An OpenAI-compatible server as judge: GPT-4 as in the study, or a server of one's own.

The key comes from an environment variable and goes nowhere else. A request is tried again on rate limits, time-outs,
broken connections and server errors, with exponential back-off, and not before the server's Retry-After. The reply must
hold exactly one rating `[[n]]`, a number from 1 to 10; a reply that does not is answered once with a reminder.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from prefscan.errors import UserError
from prefscan.judges import Prompt, Verdict
from prefscan.params import OpenAIJudge

RATING = re.compile(r"\[\[([^\[\]]*)\]\]")
PASSING = (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError)
LONGEST_WAIT = 600.0  # seconds that a server may ask for; a stage that sleeps for hours looks like one that hangs
REMINDER = (
    "Your reply has no rating that can be read. Answer again with one rating only, a number from 1 to 10 in exactly "
    'this format: "[[rating]]", for example: "Rating: [[5]]".'
)


def retry_after(error: BaseException | None) -> float:
    """The seconds that the server asked to wait, as a number or until a date (RFC 9110, 10.2.3); 0 when it did not."""
    header = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_WAIT)


def parse_rating(text: str) -> Verdict:
    """The one rating in a reply; no score when there is none, when several differ, or when it is not from 1 to 10."""
    ratings = set(RATING.findall(text))
    if len(ratings) != 1:
        found = f"{len(ratings)} different ratings" if ratings else "no rating"
        return Verdict(None, text, f"{found} of the form [[n]] in the reply")
    (rating,) = ratings
    if not re.fullmatch(r"\d{1,2}(\.\d+)?", rating) or not 1 <= float(rating) <= 10:
        return Verdict(None, text, f"rating {rating!r} is no number from 1 to 10")
    return Verdict(float(rating), text)


class ChatJudge:
    """Asks a chat completions end point, several prompts at once."""

    def __init__(self, client: openai.OpenAI, judge: OpenAIJudge) -> None:
        self.client = client
        self.judge = judge

    def ask(self, prompt: Prompt) -> Verdict:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": prompt.user},
        ]
        first = self.reply(messages, prompt.sample)
        if first.score is not None or not first.text:
            return first
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": REMINDER}]
        second = self.reply(messages, prompt.sample)
        if not second.text:
            return second  # not answered: the next run asks from the start
        return replace(second, text=f"{first.text}\n\n[{REMINDER}]\n\n{second.text}")

    def reply(self, messages: list[ChatCompletionMessageParam], sample: int) -> Verdict:
        """The server's reply, with its rating or why there is none; the text is empty where there is no reply."""
        backoff = wait_random_exponential(multiplier=0.5, max=60)

        def wait(state: RetryCallState) -> float:
            return max(backoff(state), retry_after(state.outcome.exception() if state.outcome else None))

        retrying = Retrying(
            retry=retry_if_exception_type(PASSING),
            stop=stop_after_attempt(self.judge.attempts),
            wait=wait,
            reraise=True,
        )
        try:
            reply = retrying(
                self.client.chat.completions.create,
                model=self.judge.name,
                messages=messages,
                temperature=0,
                max_tokens=self.judge.max_tokens,
                seed=openai.omit if self.judge.seed is None else self.judge.seed + sample,
            )
        except openai.APIStatusError as error:
            return Verdict(None, "", f"the server answered {error.status_code} ({type(error).__name__})")
        except openai.OpenAIError as error:
            return Verdict(None, "", f"the request failed {self.judge.attempts} times ({type(error).__name__})")
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, ChatCompletion):  # the client hands on whatever came with status 200
            return Verdict(None, "", "the server sent no chat completion; check judge.base_url")
        message = reply.choices[0].message if reply.choices else None
        text = message.content if message else None
        if not text:
            return Verdict(None, "", "the server sent an empty reply")
        return replace(parse_rating(text), served_by=" ".join(filter(None, [reply.model, reply.system_fingerprint])))

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        pool = ThreadPoolExecutor(self.judge.concurrency)
        try:
            futures = {pool.submit(self.ask, prompt): place for place, prompt in enumerate(prompts)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a caller that stops early pays for no more


def make(judge: OpenAIJudge) -> ChatJudge:
    """Raises UserError when the environment variable that should hold the key holds none."""
    key = os.environ.get(judge.key_variable)
    if not key:
        raise UserError(
            f"judge.key_variable: the environment has no {judge.key_variable}; export it, or take the local judge with "
            "`dvc exp run -S judge=local`"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"judge.key_variable: {judge.key_variable} holds a line end or a typographic sign; export it again"
        )
    # Tenacity does the retrying, so that attempts are counted in one place.
    client = openai.OpenAI(api_key=key, base_url=judge.base_url, timeout=judge.timeout, max_retries=0)
    return ChatJudge(client, judge)
