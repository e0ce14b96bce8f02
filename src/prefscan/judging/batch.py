"""OpenAI's Batch API: requests in a file, replies within a day, at half the price; a batch outlives the stage.

A record is written before a batch is created, with a mark that the batch carries, and removed when its replies are
kept. So a stage that was killed at any moment finds its batch again, by the record or by the mark, and nothing is paid
twice.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from openai.types.chat import ChatCompletion

from prefscan.common.config import Batch
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, write_json
from prefscan.endpoints.chat_client import Reply, Session, reply_of, words_in
from prefscan.endpoints.workers import NoReply

ENDED = ("completed", "failed", "expired", "cancelled")
POLL_SECONDS = 60.0  # for a batch of an earlier run, where judge.batch is null now
ENDPOINT: Final = "/v1/chat/completions"

# Gets a request's name, its reply or why there is none, and the purchase's name in the ledger.
Receive = Callable[[str, Reply | NoReply, str], None]


def flat(request: dict[str, Any]) -> dict[str, Any]:
    """The body of a request as it goes over the line."""
    return {key: value for key, value in request.items() if key != "extra_body"} | request.get("extra_body", {})


class Batches:
    """The batches of one server that are under way, a record each in `folder`.

    `discount` and `most`, in USD by request, are those of the batch that is being collected.
    """

    def __init__(self, folder: Path, session: Session, settings: Batch | None) -> None:
        self.folder = folder
        self.session = session
        self.settings = settings
        self.discount = 0.0
        self.most: dict[str, float] = {}

    def records(self) -> dict[Path, Any]:
        found = {path: read_json(path) for path in sorted(self.folder.glob("*.json"))}
        return {path: record for path, record in found.items() if record["address"] == self.session.address}

    def needed(self) -> bool:
        """Whether a batch is to be made or waited for; one of an earlier run also where none is to be made."""
        return self.settings is not None or bool(self.records())

    def _marked(self, mark: str) -> str | None:
        """The id of the batch that carries the mark."""
        batches = self.session.client.batches.list(limit=100)
        return next((batch.id for batch in batches if (batch.metadata or {}).get("prefscan") == mark), None)

    def submit(self, requests: dict[str, dict[str, Any]], most: dict[str, float]) -> None:
        """Create a batch of the requests by their names; raises NoReply where the server takes none."""
        assert self.settings  # by whoever asks
        mark, client = uuid4().hex, self.session.client
        lines = [
            {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": flat(request)}
            for name, request in requests.items()
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        file = self.session.call(lambda: client.files.create(file=(f"{mark}.jsonl", content), purpose="batch"))
        path = self.folder / f"{mark}.json"
        record = {"id": None, "address": self.session.address, "discount": self.settings.discount, "most": most}
        write_json(path, record)
        tried: list[bool] = []

        def create() -> str:
            # The answer to an attempt may have got lost, and its batch would be paid as well.
            if tried and (found := self._marked(mark)):
                return found
            tried.append(True)
            made = client.batches.create(
                input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"prefscan": mark}
            )
            return made.id

        try:
            record["id"] = self.session.call(create)
        except NoReply as fault:
            if not fault.passing:  # refused: there is none
                path.unlink()
            raise
        write_json(path, record)
        print(f"batch {record['id']} of {len(requests)} requests submitted; a stage that is stopped finds it again")

    def collect(self, receive: Receive) -> None:
        """Wait for all batches under way and hand on their replies; raises UserError where one cannot be looked up."""
        for path, record in self.records().items():
            try:
                number = record["id"] or self.session.call(lambda mark=path.stem: self._marked(mark))  # type: ignore[misc]
                if number is not None:
                    self._collect(number, record, receive)
            except NoReply as fault:
                raise UserError(
                    f"{path}: the batch {record['id'] or ''} cannot be looked up ({fault}); run again, or delete the "
                    "file to submit its requests anew and pay for both"
                ) from None
            path.unlink()  # also of a batch that the server never got

    def _collect(self, number: str, record: dict[str, Any], receive: Receive) -> None:
        batch = self._ended(number)
        self.discount, self.most = record["discount"], record["most"]
        left = set(self.most)
        for name, found in self._replies(batch):
            if name in left:
                left.remove(name)
                receive(name, found, f"{number}/{name}")
        errors = getattr(batch.errors, "data", None) or ()
        words = "; ".join(dict.fromkeys(words_in(error.to_dict(), self.session.client.api_key) for error in errors))
        reason = f"batch {number} ended as {batch.status} without it{f': {words}' if words else ''}"
        for name in sorted(left):
            receive(name, NoReply(reason, passing=True), "")

    def _ended(self, number: str) -> Any:
        """The batch, when it has ended."""
        client, before = self.session.client, None
        pause = self.settings.poll_seconds if self.settings else POLL_SECONDS
        while (batch := self.session.call(lambda: client.batches.retrieve(number))).status not in ENDED:
            counts = batch.request_counts
            state = f"batch {number}: {batch.status}" + (f", {counts.completed} of {counts.total}" if counts else "")
            if state != before:
                print(state, flush=True)
            before = state
            self.session.breaker.wait(pause)
        return batch

    def _replies(self, batch: Any) -> Iterator[tuple[str, Reply | NoReply]]:
        """Each request's name, and its reply or why there is none, from the batch's files."""
        client = self.session.client
        for number in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = self.session.call(lambda number=number: client.files.content(number)).text  # type: ignore[misc]
            for line in map(json.loads, content.splitlines()):
                response, error = line.get("response") or {}, line.get("error")
                body = response.get("body") or {}
                if error or response.get("status_code") != 200 or body.get("error"):
                    words = words_in(error or body.get("error") or body, client.api_key)
                    code = response.get("status_code") or (error or {}).get("code")
                    yield (
                        line["custom_id"],
                        NoReply(
                            f"the batch has {code} for it: {words}", passing=code in (429, 500, 503, "batch_expired")
                        ),
                    )
                    continue
                try:
                    yield line["custom_id"], reply_of(ChatCompletion.construct(**body))
                except NoReply as fault:
                    yield line["custom_id"], fault
