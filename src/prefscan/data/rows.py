"""What the keys of a raw row and of its messages mean, so that none that changes the meaning is ignored."""

import json
from pathlib import Path
from typing import Any

from prefscan.common.errors import UserError
from prefscan.common.io import BAD_JSON, read_text

# Keys that say where a row comes from, how good it is or how it was made; whatever is not here is refused by name.
HARMLESS_KEYS = (
    "id _id idx index uuid prompt_id conversation_id question_id sample_id row_id dialogue_id hash source "
    "sources dataset dataset_name origin origin_dataset split subset category categories task topic "
    "topics tag tags language lang license url timestamp created_at date status order num_turns "
    "difficulty quality rationale comment score scores score_chosen score_rejected chosen_score "
    "rejected_score score_diff rank ranks reward rewards rating ratings rating_chosen rating_rejected "
    "chosen_rating rejected_rating chosen_avg_rating rejected_avg_rating model models model_name "
    "chosen_model rejected_model model_chosen model_rejected chosen_policy rejected_policy annotator "
    "annotator_id labelling_model labelling_prompt raw_labelling_response generation_model "
    "generation_models generations original_chosen original_rejected original_response in_gsm8k_train"
)
HARMLESS = frozenset(HARMLESS_KEYS.split())
RESTATED = ("prompt", "question", "instruction")  # as text: a user's turn that the lists have as well
FIELDS = ("reasoning_content", "tool_calls", "name", "tool_call_id")  # of a message, for the template to render
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_file(path: Path) -> Any:
    """The content of a .json or .jsonl file, whichever of the two it holds: a list, or JSON lines."""
    text = read_text(path)
    try:
        whole = json.loads(text)
    except BAD_JSON as error:
        fault = error
    else:
        return [whole] if path.suffix == ".jsonl" and not isinstance(whole, list) else whole
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except BAD_JSON as error:
                # Of a file that is no JSON lines at all, the fault of the whole says more.
                where, why = (f", line {number}", error) if rows or path.suffix == ".jsonl" else ("", fault)
                raise UserError(
                    f"{path}{where} is not JSON: {why}; the file may be cut short, fetch it again"
                ) from None
    return rows


def says_nothing(value: Any) -> bool:
    """As the columns that a Parquet file has for other rows' sake."""
    return value is None or value in ("", [], {})


def refuse_keys(row: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """Raises UserError for a key that may change what the row or message means and that nothing here reads."""
    for key, value in row.items():
        if key not in known and str(key).lower() not in HARMLESS and not says_nothing(value):
            raise UserError(
                f"{place}: prefscan does not read the key {key!r}, which may change what the row means; remove it from "
                "the rows, or rename it to `comment` where it changes nothing"
            )


def read_message(message: Any, role_key: str, content_key: str, place: str) -> tuple[str, ...]:
    """Role and content of a message, and as JSON what else the chat template is to render."""
    role = ROLES[message[role_key]]
    refuse_keys(message, (role_key, content_key, *FIELDS), place)
    fields = {key: message[key] for key in FIELDS if not says_nothing(message.get(key))}
    if role != "tool" and (unknown := {"name", "tool_call_id"} & fields.keys()):
        raise UserError(f"{place}: a turn of {role} has the key {min(unknown)!r}, which only a tool's may; remove it")
    if not isinstance(fields.get("reasoning_content", ""), str):
        raise UserError(f"{place}: a reasoning_content is not text; correct or remove the row")
    calls = fields.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{place}: tool_calls is not a list of objects; correct or remove the row")
    content = message.get(content_key, "") if "tool_calls" in fields else message[content_key]
    return (role, content or "", json.dumps(fields)) if fields else (role, content or "")


def read_tools(row: dict[str, Any], place: str) -> str:
    """The row's tools as JSON, which ShareGPT's rows hold as text; empty where it has none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except BAD_JSON:
            raise UserError(f"{place}: tools is not JSON; correct or remove the row") from None
    if says_nothing(tools) or isinstance(tools, str):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: tools is not a list of objects; correct or remove the row")
    return json.dumps(tools)
