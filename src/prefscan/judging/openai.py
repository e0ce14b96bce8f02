"""An OpenAI-compatible server as judge: GPT-4 as in the study, or a server of one's own.

A reply is a verdict only if it is whole: it ended by itself, refused nothing, and holds exactly one verdict outside its
thinking. One without a verdict is answered once with a reminder. Every reply is kept by a hash of its request, with a
score or without, and no request whose reply is kept is sent again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from prefscan.common.config import OpenAIJudge
from prefscan.common.io import BAD_JSON, read_json, write_json
from prefscan.common.paths import judge_store
from prefscan.endpoints.chat_client import (
    ErrorInReply,
    Reply,
    Session,
    check_errors,
    counted,
    may_be_billed,
)
from prefscan.endpoints.workers import NoReply, at_once
from prefscan.judging.batch import Batches
from prefscan.judging.budget import Spending, fewest_tokens, most_tokens, price
from prefscan.judging.judge import Prompt, Verdict, mode_of


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


class Unkept(Exception):
    """A request whose reply is not in the store."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        self.request = request


class ChatJudge:
    """Asks a chat completions end point, several prompts at once, for what is not in the store."""

    def __init__(self, judge: OpenAIJudge, store: Path) -> None:
        self.judge = judge
        self.store = store
        self.replies = Replies(store, judge.base_url)
        self.mode = mode_of(judge)
        self.discount = judge.batch.discount if judge.batch else 0.0

    def usd(self, reply: Reply) -> float:
        tokens = reply.input_tokens or 0, reply.output_tokens or 0
        return price(self.judge.prices, *tokens) * (1 - reply.discount)

    def most(self, request: dict[str, Any]) -> float:
        """USD that a request can cost: a token for each byte of its prompt, and all of judge.max_tokens."""
        most = price(self.judge.prices, most_tokens(request["messages"]), self.judge.max_tokens)
        return most * (1 - self.discount)

    def request(self, prompt: Prompt, *later: dict[str, str]) -> dict[str, Any]:
        """The body of a request, without key."""
        judge = self.judge
        first = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        return {
            "model": judge.model,
            "messages": [*first, *later],
            judge.limit_field: judge.max_tokens,
            **({} if judge.temperature is None else {"temperature": judge.temperature}),
            **({} if judge.seed is None else {"seed": judge.seed + prompt.sample}),
            **({"extra_body": judge.extra_body} if judge.extra_body else {}),
        }

    def reminded(self, prompt: Prompt, first: Reply) -> dict[str, Any]:
        """The request for another reply after one without verdict; many servers refuse an empty assistant turn."""
        if not first.said.strip():
            return self.request(replace(prompt, user=f"{prompt.user}\n\n{self.mode.reminder}"))
        return self.request(
            prompt,
            {"role": "assistant", "content": first.said},
            {"role": "user", "content": self.mode.reminder},
        )

    def kept(self, request: dict[str, Any], sample: int) -> Reply:
        """The reply in the store; raises Unkept where it has none."""
        reply = self.replies.get(request, sample)
        if reply is None:
            raise Unkept(request)
        return reply

    def keep(self, request: dict[str, Any], sample: int, reply: Reply) -> Reply:
        """Put a reply into the store; raises NoReply for one to a prompt that the server has truncated."""
        least = fewest_tokens(request["messages"])
        if reply.input_tokens is not None and 0 < reply.input_tokens < least:
            raise NoReply(
                f"the server counted {reply.input_tokens} tokens in a prompt that has {least} or more: it truncates "
                "prompts; raise its context length",
                passing=True,
                stops=True,
            )
        self.replies.put(request, sample, reply)
        return reply

    def used_up(self, reply: Reply) -> bool:
        """Whether all of judge.max_tokens went into reasoning, and nothing was said."""
        return reply.finish == "length" and not reply.said.strip()

    def read(self, reply: Reply) -> Verdict:
        """The verdict in a whole reply, and the reason why there is none in any other."""
        limit = f"judge.max_tokens ({self.judge.max_tokens})"
        if reply.refusal or reply.finish not in ("stop", "length"):
            ended = "gave no finish_reason" if reply.finish is None else f"ended the reply with {reply.finish!r}"
            reason = f"the server {ended}{f': {reply.refusal}' if reply.refusal else ''}"
        elif self.used_up(reply):
            reason = f"{limit} was used up by reasoning before any verdict; raise it"
        elif reply.finish == "length":
            reason = f"cut at {limit}; raise it"
        else:
            found = self.mode.parse(reply.said)
            return replace(found, text=reply.text)
        return Verdict(None, reply.text, reason)

    def verdict(self, prompt: Prompt, reply: Callable[[dict[str, Any], int], Reply]) -> Verdict:
        """The verdict from the replies to one or two requests; raises what `reply` raises for the first.

        A reminder follows a whole reply alone: what was cut, filtered or refused would be so again.
        """
        request = self.request(prompt)
        first = reply(request, prompt.sample)
        verdict = replace(self.read(first), served_by=first.served_by, usd=self.usd(first))
        if verdict.score is not None:
            return verdict
        kept = f", kept in {self.replies.path(request, prompt.sample)}"
        if first.refusal or first.finish != "stop":
            return replace(verdict, reason=verdict.reason + kept)
        request = self.reminded(prompt, first)
        try:
            second = reply(request, prompt.sample)
        except NoReply as fault:
            reason = f"{fault}, asked again after {verdict.reason}{kept}"
            return replace(verdict, reason=str(fault) if fault.passing else reason, passing=fault.passing)
        verdict = self.read(second)
        kept = f", kept in {self.replies.path(request, prompt.sample)}"
        return replace(
            verdict,
            text=f"{first.text}\n\n[{self.mode.reminder}]\n\n{second.text}",
            reason=verdict.reason and verdict.reason + kept,
            served_by=second.served_by,
            usd=self.usd(first) + self.usd(second),
        )

    def buy(self, session: Session, spending: Spending, request: dict[str, Any], sample: int) -> Reply:
        """The reply in the store, else the server's, which is kept; raises NoReply where there is none to use."""
        if kept := self.replies.get(request, sample):
            return kept
        most = self.most(request)

        def send() -> Any:
            with spending.purchase(most, self.judge.name) as purchase:
                session.breaker.check()  # the stage may have ended while the purchase waited for the budget
                purchase.usd = most  # what is under way when the process ends
                try:
                    found = session.client.chat.completions.create(**request)
                    tokens = counted(found)
                    purchase.usd = price(self.judge.prices, *tokens) if tokens else most
                    check_errors(found)
                except Exception as error:
                    if isinstance(error, ErrorInReply):
                        purchase.usd = purchase.usd if counted(found) else 0.0
                    else:
                        purchase.usd = most if may_be_billed(error) or isinstance(error, BAD_JSON) else 0.0
                    raise
                return found

        try:
            reply = self.keep(request, sample, session.complete(request, send))
        except NoReply as fault:
            if fault.stops:
                session.breaker.trip(str(fault))
            raise
        if self.used_up(reply):
            session.breaker.strike(self.read(reply).reason)
        else:
            session.breaker.clear()
        return reply

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
            except Unkept:
                waiting.append(prompt)
        if not waiting:
            return
        self.store.mkdir(parents=True, exist_ok=True)
        with (
            Session(self.judge, "judge") as session,  # kept replies need no key
            FileLock(self.store / ".lock"),
        ):
            spending = Spending(self.store / "spending.jsonl", self.judge.budget)
            lost: dict[str, NoReply] = {}
            batches = Batches(self.store / "batches", session, self.judge.batch)
            if batches.needed():
                self.buy_in_batches(batches, spending, waiting, lost)

            def ask(prompt: Prompt) -> Verdict:
                try:
                    return self.verdict(prompt, reply)
                except NoReply as fault:
                    return Verdict(None, "", str(fault), passing=fault.passing)

            def reply(request: dict[str, Any], sample: int) -> Reply:
                if not self.judge.batch:
                    return self.buy(session, spending, request, sample)
                if fault := lost.get(self.replies.path(request, sample).stem):
                    raise fault
                return self.kept(request, sample)

            try:
                for prompt, verdict in at_once(ask, waiting, self.judge.concurrency, session.breaker):
                    yield from given(prompt, verdict)
            finally:
                spending.give_up(self.judge.name)

    def buy_in_batches(
        self, batches: Batches, spending: Spending, prompts: list[Prompt], lost: dict[str, NoReply]
    ) -> None:
        """Have all replies to the prompts in the store, or in `lost` why not: first requests, then reminders.

        A batch that an earlier run submitted is waited for before anything is submitted, so nothing is paid twice.
        """

        def missing() -> dict[str, tuple[dict[str, Any], int]]:
            found = {}
            for prompt in prompts:
                try:
                    with suppress(NoReply):
                        self.verdict(prompt, self.kept)
                except Unkept as unkept:
                    name = self.replies.path(unkept.request, prompt.sample).stem
                    if name not in lost:
                        found[name] = (unkept.request, prompt.sample)
            return found

        def received(name: str, found: Reply | NoReply, purchase: str) -> None:
            """Keep one reply of a batch, and book what it cost."""
            request, sample = by_name.get(name, (None, 0))
            try:
                if isinstance(found, NoReply):
                    raise found
                reply = replace(found, discount=batches.discount)
                usd = batches.most[name] if reply.input_tokens is None else self.usd(reply)
                spending.book(usd, self.judge.name, purchase)
                if request is None:  # of a stage whose prompts are not these: kept for it
                    write_json(self.store / f"{name}.json", asdict(reply))
                else:
                    self.keep(request, sample, reply)
            except NoReply as fault:
                lost[name] = fault

        by_name = missing()
        batches.collect(received)
        while self.judge.batch and (by_name := missing()):
            chosen, held = {}, 0.0
            for name, (request, _) in by_name.items():
                most = self.most(request)
                if spending.budget is None or spending.spent + held + most <= spending.budget:
                    held += most
                    chosen[name] = request
            try:
                if chosen:
                    batches.submit(chosen, {name: self.most(request) for name, request in chosen.items()})
                    batches.collect(received)
                else:  # what fits after the others have cost less than their most was submitted before
                    lost |= {name: spending.too_small(self.most(request)) for name, (request, _) in by_name.items()}
            except NoReply as fault:
                lost |= dict.fromkeys(chosen, fault)


def make(judge: OpenAIJudge) -> ChatJudge:
    return ChatJudge(judge, judge_store())
