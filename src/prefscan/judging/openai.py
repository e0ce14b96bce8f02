"""An OpenAI-compatible server as judge: GPT-4 as in the study, or a server of one's own.

The reply must hold exactly one rating `[[n]]`, a number from 1 to 10, or one verdict `[[A]]`, `[[B]]` or `[[C]]` on a
pair; a reply that does not is answered once with a reminder. Every reply is kept by a hash of its request, with a score
or without, and no request whose reply is kept is sent again.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
from filelock import FileLock

from prefscan.common.config import OpenAIJudge
from prefscan.common.io import BAD_JSON, read_json, write_json
from prefscan.common.paths import judge_store
from prefscan.endpoints.chat_client import NoReply, Reply, complete, counted, make_client, may_be_billed
from prefscan.judging.budget import Spending, most_tokens, price
from prefscan.judging.judge import WINNERS, Prompt, Verdict

BRACKETED = re.compile(r"\[\[([^\[\]]*)\]\]")
NUMBER = re.compile(r"\s*[-+]?[0-9.]+(/[0-9]+)?\s*")  # what may be meant for a rating, even a wrong one
REMINDERS = {
    "single": "Your reply has no rating that can be read. Answer again with one rating only, a number from 1 to 10 in "
    'exactly this format: "[[rating]]", for example: "Rating: [[5]]".',
    "pair": "Your reply has no verdict that can be read. Answer again with one verdict only, in exactly this format: "
    '"[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for a tie.',
}


def parse_rating(text: str) -> Verdict:
    """The one rating in a reply; no score when there is none, when several differ, or when it is not from 1 to 10.

    Other brackets beside ratings, as in quoted code `[[ -f x ]]`, are no ratings.
    """
    bracketed = set(BRACKETED.findall(text))
    ratings = {found for found in bracketed if NUMBER.fullmatch(found)} or bracketed
    if len(ratings) != 1:
        found = f"{len(ratings)} different ratings" if ratings else "no rating"
        return Verdict(None, text, f"{found} of the form [[n]] in the reply")
    (rating,) = ratings
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", rating) or not 1 <= float(rating) <= 10:
        return Verdict(None, text, f"rating {rating!r} is no number from 1 to 10")
    return Verdict(float(rating), text)


def parse_winner(text: str) -> Verdict:
    """The one verdict on a pair in a reply; no score when there is none or when several differ."""
    winners = set(BRACKETED.findall(text)) & set(WINNERS)
    if len(winners) != 1:
        found = f"{len(winners)} different verdicts" if winners else "no verdict"
        return Verdict(None, text, f"{found} of the form [[A]], [[B]] or [[C]] in the reply")
    return Verdict(WINNERS[winners.pop()], text)


PARSERS = {"single": parse_rating, "pair": parse_winner}


class Replies:
    """Replies that were paid for, one file each in `folder`, named by a hash of request and server."""

    def __init__(self, folder: Path, base_url: str | None) -> None:
        self.folder = folder
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")  # as the client does

    def path(self, request: dict[str, Any], sample: int) -> Path:
        content = json.dumps([self.base_url, request, sample], ensure_ascii=False, sort_keys=True)
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"

    def get(self, request: dict[str, Any], sample: int) -> Reply | None:
        path = self.path(request, sample)
        return Reply(**read_json(path)) if path.exists() else None

    def put(self, request: dict[str, Any], sample: int, reply: Reply) -> None:
        write_json(self.path(request, sample), asdict(reply))


class ChatJudge:
    """Asks a chat completions end point, several prompts at once, for what is not in the store."""

    def __init__(self, judge: OpenAIJudge, store: Path) -> None:
        self.judge = judge
        self.store = store
        self.replies = Replies(store, judge.base_url)
        self.parse = PARSERS[judge.mode]

    def usd(self, reply: Reply) -> float:
        return price(self.judge.prices, reply.input_tokens or 0, reply.output_tokens or 0)

    def request(self, prompt: Prompt, *later: dict[str, str]) -> dict[str, Any]:
        """The body of a request, without key."""
        judge = self.judge
        seed = {} if judge.seed is None else {"seed": judge.seed + prompt.sample}
        temperature = {} if judge.temperature is None else {"temperature": judge.temperature}
        first = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        return {
            "model": judge.name,
            "messages": [*first, *later],
            judge.limit_field: judge.max_tokens,
            **temperature,
            **seed,
        }

    def kept(self, request: dict[str, Any], sample: int) -> Reply:
        """The reply in the store; raises NoReply where it has none."""
        reply = self.replies.get(request, sample)
        if reply is None:
            raise NoReply("not asked yet")
        return reply

    def buy(self, client: openai.OpenAI, spending: Spending, request: dict[str, Any], sample: int) -> Reply:
        """The reply in the store, else the server's, which is kept; raises NoReply where there is none to use."""
        if kept := self.replies.get(request, sample):
            return kept
        most = price(self.judge.prices, most_tokens(request["messages"]), self.judge.max_tokens)

        def send() -> Any:
            with spending.purchase(most, self.judge.name) as purchase:
                try:
                    found = client.chat.completions.create(**request)
                except Exception as error:
                    purchase.usd = most if may_be_billed(error) or isinstance(error, BAD_JSON) else 0.0
                    raise
                tokens = counted(found)
                purchase.usd = price(self.judge.prices, *tokens) if tokens else most
                return found

        reply = complete(send, self.judge.attempts, client.api_key)
        self.replies.put(request, sample, reply)
        return reply

    def verdict(self, prompt: Prompt, reply: Callable[[dict[str, Any], int], Reply]) -> Verdict:
        """The verdict from the replies to one or two requests; raises NoReply where `reply` does."""
        request = self.request(prompt)
        first = reply(request, prompt.sample)
        verdict = replace(self.parse(first.text), served_by=first.served_by, usd=self.usd(first))
        if verdict.score is not None:
            return verdict
        reminder = REMINDERS[self.judge.mode]
        request = self.request(
            prompt, {"role": "assistant", "content": first.text}, {"role": "user", "content": reminder}
        )
        second = reply(request, prompt.sample)
        verdict = self.parse(second.text)
        return replace(
            verdict,
            text=f"{first.text}\n\n[{reminder}]\n\n{second.text}",
            reason=verdict.reason and f"{verdict.reason}, kept in {self.replies.path(request, prompt.sample)}",
            served_by=second.served_by,
            usd=self.usd(first) + self.usd(second),
        )

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        """Kept replies first. Two processes never pay for one prompt: the second waits until the first has ended.

        A prompt that stands in several places, as a pair of equal answers does in both orders, is asked once: each
        place has its verdict, and the first its cost.
        """
        places: dict[Prompt, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(prompt, []).append(place)

        def given(prompt: Prompt, verdict: Verdict) -> Iterator[tuple[int, Verdict]]:
            first, *others = places[prompt]
            yield first, verdict
            yield from ((place, replace(verdict, usd=0.0)) for place in others)

        waiting = []
        for prompt in places:
            try:
                yield from given(prompt, self.verdict(prompt, self.kept))
            except NoReply:
                waiting.append(prompt)
        if not waiting:
            return
        judge = self.judge
        client = make_client(judge.base_url, judge.key_variable, judge.timeout, "judge")  # kept replies need no key
        self.store.mkdir(parents=True, exist_ok=True)
        with FileLock(self.store / ".lock"):
            buy = partial(self.buy, client, Spending(self.store / "spending.jsonl", self.judge.budget))

            def ask(prompt: Prompt) -> Verdict:
                try:
                    return self.verdict(prompt, buy)
                except NoReply as fault:
                    return Verdict(None, "", str(fault))

            pool = ThreadPoolExecutor(self.judge.concurrency)
            try:
                futures = {pool.submit(ask, prompt): prompt for prompt in waiting}
                for future in as_completed(futures):
                    yield from given(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)  # a caller that stops early pays for no more


def make(judge: OpenAIJudge) -> ChatJudge:
    return ChatJudge(judge, judge_store())
