"""An OpenAI-compatible server as judge: GPT-4 as in the study, or a server of one's own.

The key comes from an environment variable and goes nowhere else. A request is tried again with exponential back-off on
rate limits, time-outs, broken connections and server errors; the reply must hold exactly one rating `[[n]]`, a number
from 1 to 10.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai
from openai.types.chat import ChatCompletion
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from prefscan.errors import UserError
from prefscan.judges import Prompt, Verdict
from prefscan.params import OpenAIJudge

RATING = re.compile(r"\[\[([^\[\]]*)\]\]")
PASSING = (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError)


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
        retrying = Retrying(
            retry=retry_if_exception_type(PASSING),
            stop=stop_after_attempt(self.judge.attempts),
            wait=wait_random_exponential(multiplier=0.5, max=60),
            reraise=True,
        )
        try:
            reply = retrying(
                self.client.chat.completions.create,
                model=self.judge.name,
                messages=[{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
                temperature=0,
                max_tokens=self.judge.max_tokens,
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
        return parse_rating(text) if text else Verdict(None, "", "the server sent an empty reply")

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
