"""Turn raw preference pairs into tokens, and split them into training and held-out pairs.

    prefscan prepare

Three shapes of row are understood, told apart by their keys: Orca's (`system`, `question`, `chosen`, `rejected`),
UltraFeedback's (`chosen` and `rejected` are lists of messages that differ in the last), and ShareGPT-like ones
(`conversations`, then one `chosen` and one `rejected` message). Each becomes prompt messages, a chosen and a rejected
text, rendered by the tokenizer's own chat template. For KTO, the chosen are the good examples, the rejected the bad.

Nothing is truncated: a pair that does not fit the length limit is dropped and counted in metrics/prepare.json.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefscan.common.config import Data
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl
from prefscan.data.split import PreparedPairs, fits, is_held_out, settle_sides

Message = dict[str, str]
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses to it, the first preferred."""

    prompt: tuple[tuple[str, str], ...]  # (role, content), the last one the user's
    chosen: str
    rejected: str

    @property
    def messages(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def prompt_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.prompt, ensure_ascii=False).encode()).hexdigest()

    @property
    def id(self) -> str:
        content = json.dumps([self.prompt, self.chosen, self.rejected], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of every .jsonl, .json and .parquet file of a folder, each with the place it came from."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            rows = read_jsonl(path)
        elif path.suffix == ".json":
            rows = read_json(path)
        elif path.suffix == ".parquet":
            import pandas as pd

            try:
                rows = json.loads(pd.read_parquet(path).to_json(orient="records"))
            except ValueError as error:
                raise UserError(f"{path} is not Parquet: {error}; it may be cut short, fetch it again") from None
        else:
            raise UserError(
                f"{path}: pairs are read from .jsonl, .json and .parquet files, not {path.suffix or 'this'}; "
                "convert it, or name another file in data.source"
            )
        if not isinstance(rows, list):
            raise UserError(
                f"{path}: expected a list of pairs, found {type(rows).__name__}; correct it, or name another file in "
                "data.source"
            )
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row


def parse_pair(row: Any, place: str) -> Pair:
    """One row in the common schema; raises UserError, with the row's place, for a row of no known shape."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}; correct or remove the row")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise UserError(f"{place}: the pair has no {key!r} (keys: {_keys(row)}); add it or remove the row")
    prompt = [("system", row["system"])] if row.get("system") else []
    try:
        if "conversations" in row:
            prompt += [_message(m, "from", "value") for m in row["conversations"]]
            answers = [_message(row[key], "from", "value") for key in ("chosen", "rejected")]
        elif "question" in row:
            prompt.append(("user", row["question"]))
            answers = [("assistant", row[key] or "") for key in ("chosen", "rejected")]
        elif isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
            turns = [[_message(m, "role", "content") for m in row[key][:-1]] for key in ("chosen", "rejected")]
            prompt += turns[0]
            if turns[0] != turns[1]:
                raise UserError(f"{place}: chosen and rejected answer different prompts; correct or remove the row")
            answers = [_message(row[key][-1], "role", "content") for key in ("chosen", "rejected")]
        else:
            raise UserError(
                f"{place}: unknown shape (keys: {_keys(row)}); prefscan reads system/question, "
                "conversations, or chosen and rejected as lists of messages; convert or remove the row"
            )
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{place}: malformed pair ({type(error).__name__}: {error}); correct or remove the row"
        ) from None
    if not all(_is_text(content) for _, content in (*prompt, *answers)):
        raise UserError(f"{place}: a prompt or response is not text; correct or remove the row")
    if not prompt or prompt[-1][0] != "user":
        raise UserError(f"{place}: the prompt does not end with the user's turn; correct or remove the row")
    if any(role != "assistant" for role, _ in answers):
        raise UserError(f"{place}: chosen or rejected is not the assistant's turn; correct or remove the row")
    return Pair(prompt=tuple(prompt), chosen=answers[0][1], rejected=answers[1][1])


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, sorted(row)))


def _message(message: Any, role_key: str, content_key: str) -> tuple[str, str]:
    return ROLES[message[role_key]], message[content_key] or ""


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold; JSON can also escape one half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def tokenize(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The pair as text and as tokens under the tokenizer's chat template.

    A response starts where the tokens of prompt and of prompt + response part, as in TRL.
    Raises UserError when the template refuses a conversation, and when it renders one so that it does not start with
    its own prompt.
    """

    def render(messages: list[Message], for_generation: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=for_generation, tokenize=False))
        except TemplateError as error:  # for instance a template without a system turn
            raise UserError(
                f"pair {pair.id}: the chat template refuses the conversation ({' '.join(str(error).split())}); choose "
                "another model or remove such rows"
            ) from None

    prompt = render(pair.messages, True)
    responses = {}
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = render([*pair.messages, {"role": "assistant", "content": text}], False)
        if not whole.startswith(prompt):
            raise UserError(
                f"pair {pair.id}: the chat template renders prompt + answer so that it does not start with the prompt; "
                "this template cannot be trained on, choose another model"
            )
        responses[name] = whole
    prompt_ids, chosen_ids, rejected_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *responses.values())
    )
    shared = min(_common(prompt_ids, chosen_ids), _common(prompt_ids, rejected_ids))
    return {
        "id": pair.id,
        "prompt": prompt,
        "chosen": responses["chosen"][len(prompt) :],
        "rejected": responses["rejected"][len(prompt) :],
        "prompt_ids": prompt_ids[:shared],
        "chosen_ids": chosen_ids[shared:],
        "rejected_ids": rejected_ids[shared:],
    }


def _common(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, raw: Path) -> PreparedPairs:
    """The given pairs, rendered and tokenised.

    Raises UserError for a malformed row, for an empty data set, and when no pair is left on one of the two sides.
    """
    counts = Counter(
        {"rows": 0, "one_sided": 0, "empty": 0, "identical": 0, "duplicate": 0, "held_out_prompt": 0, "too_long": 0}
    )
    seen: set[str] = set()
    sides: dict[str, list[tuple[str, dict[str, Any]]]] = {"train": [], "heldout": []}
    reserved: set[str] = set()
    for split in ("heldout", "train"):
        for place, raw_row in read_rows(raw / split) if (raw / split).exists() else ():
            counts["rows"] += 1
            pair = parse_pair(raw_row, place)
            if not (pair.chosen.strip() or pair.rejected.strip()) or not pair.prompt[-1][1].strip():
                counts["empty"] += 1
            elif not pair.chosen.strip() or not pair.rejected.strip():
                counts["one_sided"] += 1
            elif pair.chosen == pair.rejected:
                counts["identical"] += 1
            elif pair.id in seen:
                counts["duplicate"] += 1
            elif split == "train" and pair.prompt_hash in reserved:
                counts["held_out_prompt"] += 1
            else:
                seen.add(pair.id)
                held_out = split == "heldout" or is_held_out(pair.prompt_hash, data.heldout_share)
                if split == "heldout":
                    reserved.add(pair.prompt_hash)
                row = tokenize(pair, tokenizer)
                if fits(row, data):
                    sides["heldout" if held_out else "train"].append((pair.prompt_hash, row))
                else:
                    counts["too_long"] += 1
    if not counts["rows"]:
        raise UserError(f"{raw}: the data set is empty; check data.source in conf/")
    return settle_sides(sides["train"], sides["heldout"], data, counts)
