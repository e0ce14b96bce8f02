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

from transformers import PreTrainedTokenizerBase

from prefscan.common.config import Data
from prefscan.common.errors import UserError
from prefscan.data.chat_template import audit
from prefscan.data.rows import RESTATED, read_file, read_message, read_tools, refuse_keys
from prefscan.data.split import PreparedPairs, fits, is_held_out, settle_sides
from prefscan.models.chat import Message, chat_ids, compact, render

SHAPES = ("conversations", "question")  # a key that decides how a row is read, but for lists of messages


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses to it, the first preferred."""

    prompt: tuple[
        tuple[str, ...], ...
    ]  # (role, content[, more of the message as JSON]), the last the user's or a tool's
    chosen: str
    rejected: str
    chosen_fields: str = ""  # JSON of what the message has beside its content: reasoning_content, tool_calls
    rejected_fields: str = ""
    tools: str = ""  # JSON

    @property
    def messages(self) -> list[Message]:
        return [message(*turn) for turn in self.prompt]

    @property
    def tool_list(self) -> Any:
        return json.loads(self.tools) if self.tools else None

    @property
    def prompt_hash(self) -> str:
        asked = [self.prompt, self.tools] if self.tools else self.prompt
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()

    @property
    def id(self) -> str:
        parts = [self.prompt, self.chosen, self.rejected]
        parts += [self.chosen_fields, self.rejected_fields, self.tools] if self.has_fields else []
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]

    @property
    def has_fields(self) -> bool:
        return bool(self.chosen_fields or self.rejected_fields or self.tools)

    def answer(self, name: str) -> Message:
        """The message of `chosen` or `rejected`."""
        return message("assistant", getattr(self, name), getattr(self, f"{name}_fields"))


def message(role: str, content: str, fields: str = "") -> Message:
    return {"role": role, "content": content} | (json.loads(fields) if fields else {})


def read_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of every .jsonl, .json and .parquet file of a folder, each with the place it came from."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jsonl", ".json"):
            rows = read_file(path)
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
    prompt: list[tuple[str, ...]] = [("system", row["system"])] if row.get("system") else []
    shape = tuple(key for key in SHAPES if key in row)
    refuse_keys(row, ("system", "chosen", "rejected", "tools", "messages", *shape, *RESTATED), place)
    tools = read_tools(row, place)
    try:
        if "conversations" in row:
            prompt += [read_message(m, "from", "value", place) for m in row["conversations"]]
            answers = [read_message(row[key], "from", "value", place) for key in ("chosen", "rejected")]
        elif isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
            sides = [[read_message(m, "role", "content", place) for m in row[key]] for key in ("chosen", "rejected")]
            prompt += explicit_prompt(row, place, [side[:-1] for side in sides])
            answers = [side[-1] for side in sides]
        elif "question" in row:
            prompt.append(("user", row["question"]))
            answers = [("assistant", row[key] or "") for key in ("chosen", "rejected")]
        else:
            raise UserError(
                f"{place}: unknown shape (keys: {_keys(row)}); prefscan reads system/question, "
                "conversations, or chosen and rejected as lists of messages; convert or remove the row"
            )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{place}: malformed pair ({type(error).__name__}: {error}); correct or remove the row"
        ) from None
    if not all(_is_text(turn[1]) for turn in (*prompt, *answers)):
        raise UserError(f"{place}: a prompt or response is not text; correct or remove the row")
    if not prompt or prompt[-1][0] not in ("user", "tool"):
        raise UserError(f"{place}: the prompt does not end with the user's turn; correct or remove the row")
    if any(turn[0] != "assistant" for turn in answers):
        raise UserError(f"{place}: chosen or rejected is not the assistant's turn; correct or remove the row")
    refuse_contradictions(row, prompt, place)
    (_, chosen, *chosen_fields), (_, rejected, *rejected_fields) = answers
    return Pair(tuple(prompt), chosen, rejected, "".join(chosen_fields), "".join(rejected_fields), tools)


def explicit_prompt(row: dict[str, Any], place: str, turns: list[list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The prompt of chosen and rejected as lists, whose `turns` come before the answers.

    As TRL reads it, `prompt` as a list of messages comes first. Where the lists repeat its end, that counts once.
    """
    if turns[0] != turns[1]:
        raise UserError(f"{place}: chosen and rejected answer different prompts; correct or remove the row")
    if not isinstance(row.get("prompt"), list) or not row["prompt"]:
        return turns[0]
    prompt = [read_message(m, "role", "content", place) for m in row["prompt"]]
    if turns[0] and prompt[-len(turns[0]) :] != turns[0] and turns[0][-len(prompt) :] != prompt:
        raise UserError(
            f"{place}: `prompt` contradicts the turns that chosen and rejected begin with; correct or remove the row"
        )
    return max(prompt, turns[0], key=len)


def refuse_contradictions(row: dict[str, Any], prompt: list[tuple[str, ...]], place: str) -> None:
    """Raises UserError where a key that repeats a part of the pair says something else."""
    asked = {turn[1].strip() for turn in prompt if turn[0] == "user"}
    for key in RESTATED:
        if isinstance(row.get(key), list) and key == "prompt" and isinstance(row["chosen"], list):
            continue  # the prompt itself
        if row.get(key) and (not isinstance(row[key], str) or row[key].strip() not in asked):
            raise UserError(f"{place}: {key!r} is no turn of the user's in the pair; correct or remove the row")
    if row.get("messages") and row["messages"] not in (row["chosen"], row["rejected"]):
        raise UserError(
            f"{place}: 'messages' is neither chosen nor rejected, so what it says would be ignored; remove that key"
        )


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, sorted(row)))


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold; JSON can also escape one half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def tokenize(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The pair as text and as tokens under the tokenizer's chat template.

    A response starts where the tokens of prompt and of prompt + response part, as in TRL.
    Raises UserError when the template refuses a conversation or leaves out a part of it, and when it renders one so
    that it does not start with its own prompt, or with text of its own before the answer.
    """

    def rendered(messages: list[Message], for_generation: bool) -> tuple[str, list[int]]:
        given = tokenizer, messages, for_generation, pair.tool_list
        try:
            return render(*given), chat_ids(*given)
        except UserError as error:
            raise UserError(f"pair {pair.id}: {error}; choose another model or remove such rows") from None

    prompt, prompt_ids = rendered(pair.messages, True)
    responses, ids = {}, {}
    for name in ("chosen", "rejected"):
        answer = pair.answer(name)
        whole, ids[name] = rendered([*pair.messages, answer], False)
        if not whole.startswith(prompt):
            raise UserError(
                f"pair {pair.id}: the chat template renders prompt + answer so that it does not start with the prompt; "
                "this template cannot be trained on, choose another model"
            )
        # What comes before the answer, where the message is nothing but its text.
        text = compact(answer["content"]) if len(answer) == 2 else ""
        if text and (before := compact(whole[len(prompt) :]).partition(text)[0]):
            raise UserError(
                f"pair {pair.id}: the chat template puts {before!r:.60} before the answer and not into the prompt; "
                "set model.chat_template_kwargs to the mode without it, as {enable_thinking: false}, or to {}"
            )
        responses[name] = whole[len(prompt) :]
    shared = min(_common(prompt_ids, whole) for whole in ids.values())
    return {
        "id": pair.id,
        "prompt": prompt,
        **responses,
        "prompt_ids": prompt_ids[:shared],
        "chosen_ids": ids["chosen"][shared:],
        "rejected_ids": ids["rejected"][shared:],
    }


def _common(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def refuse_beyond_positions(row: dict[str, Any], positions: int | None, place: str) -> None:
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    if positions is not None and longest > positions:
        raise UserError(
            f"{place}: the pair has {longest} tokens, and the model was made for {positions} "
            f"(max_position_embeddings); set data.max_length to {positions} or less, by which longer pairs are dropped "
            "and counted"
        )


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, raw: Path, positions: int | None = None) -> PreparedPairs:
    """The given pairs, rendered and tokenised.

    Raises UserError for a malformed row, for an empty data set, when no pair is left on one of the two sides, and for a
    pair of more tokens than the model has `positions`.
    """
    audit(tokenizer)
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
            chosen, rejected = pair.chosen.strip() or pair.chosen_fields, pair.rejected.strip() or pair.rejected_fields
            if not (chosen or rejected) or not pair.prompt[-1][1].strip():
                counts["empty"] += 1
            elif not chosen or not rejected:
                counts["one_sided"] += 1
            elif pair.answer("chosen") == pair.answer("rejected"):
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
                try:
                    row = tokenize(pair, tokenizer)
                except UserError as error:
                    raise UserError(f"{place}: {error}") from None
                if row["chosen_ids"] == row["rejected_ids"]:  # under a template that trims, "Oslo" and "Oslo\n"
                    counts["identical"] += 1
                elif fits(row, data):
                    refuse_beyond_positions(row, positions, place)
                    sides["heldout" if held_out else "train"].append((pair.prompt_hash, row))
                else:
                    counts["too_long"] += 1
    if not counts["rows"]:
        raise UserError(f"{raw}: the data set is empty; check data.source in conf/")
    return settle_sides(sides["train"], sides["heldout"], data, counts)
