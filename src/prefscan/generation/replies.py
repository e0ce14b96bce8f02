"""Replies of one model to many prompts at temperature 1, kept batch by batch, so that a killed stage goes on.

Reply number k to a prompt has the same random numbers under every model. The batches' composition decides the last bits
of a reply, and is the same after an interruption.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.config import Sample
from prefscan.common.fingerprint import stage_fingerprint
from prefscan.common.io import BAD_JSON
from prefscan.common.paths import UNFINISHED_REPLIES
from prefscan.generation.sampling import Reply, Sampling, prompt_ids, sample_replies

Rows = list[list[Reply]]  # by prompt, then by number


def tokenise_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], format: str) -> list[list[int]]:
    """`plain`: the text as it stands, with the tokenizer's own first token; `chat`: a user's turn by its template."""
    if format == "chat":
        return [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]


def unfinished_file(stage: str, key: str, name: str) -> Path:
    """Where replies are kept until all are there; those of other parameters, code or inputs are removed."""
    path = UNFINISHED_REPLIES / name / f"{stage_fingerprint(stage, key)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()
    return path


def read_unfinished(path: Path) -> dict[tuple[int, int], Reply]:
    """The kept replies by (prompt, number); a last line that a kill cut short is taken off the file."""
    kept: dict[tuple[int, int], Reply] = {}
    if not path.exists():
        return kept
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            batch = json.loads(line) if line.endswith(b"\n") else None
        except BAD_JSON:
            batch = None
        if batch is None:
            break
        whole += len(line)
        kept |= {(prompt, number): Reply(**reply) for prompt, number, reply in batch}
    with path.open("r+b") as file:
        file.truncate(whole)
    return kept


def reply_to_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, str]],
    replies: int,
    sample: Sample,
    unfinished: Path,
) -> Rows:
    """`replies` replies to each prompt, given by `id` and `prompt`; those of the file `unfinished` are taken over."""
    kept = read_unfinished(unfinished)
    tokens = tokenise_prompts(tokenizer, [prompt["prompt"] for prompt in prompts], sample.format)
    seeds = [[f"{sample.seed}/{prompt['id']}/{number}" for number in range(replies)] for prompt in prompts]
    settings = Sampling("sample", sample.max_new_tokens, sample.batch_size)
    with Progress() as progress, unfinished.open("a", encoding="utf-8") as file:
        task = progress.add_task("replies", total=len(prompts) * replies, completed=len(kept))
        for batch in sample_replies(model, tokenizer, tokens, seeds, settings, finished=kept):
            file.write(json.dumps([(one.prompt, one.number, asdict(one.reply)) for one in batch]) + "\n")
            file.flush()
            kept |= {(one.prompt, one.number): one.reply for one in batch}
            progress.update(task, completed=len(kept))
    return [[kept[i, number] for number in range(replies)] for i in range(len(prompts))]


def prompt_rows(
    prompts: Sequence[dict[str, str]],
    replies: Rows,
    rewards: Sequence[Sequence[tuple[float, float]]],
    kls: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """A row a prompt: `id`, `prompt`, `prompt_ids`, and each reply with its utility and score.

    `logprob` and `kl` are in nats and of the whole reply; `kls` are those of the first replies to the first prompts.
    """
    rows: list[dict[str, Any]] = []
    for i, (prompt, own, values) in enumerate(zip(prompts, replies, rewards, strict=True)):
        written = [
            {
                "text": reply.text,
                "tokens": reply.tokens,
                "logprob": sum(reply.logprobs),
                "length": len(reply.tokens),
                "truncated": reply.truncated,
                "repetition": reply.repetition,
                "utility": utility,
                "score": score,
                "kl": kls[i] if number == 0 and i < len(kls) else None,
            }
            for number, (reply, (utility, score)) in enumerate(zip(own, values, strict=True))
        ]
        rows.append({"id": prompt["id"], "prompt": prompt["prompt"], "prompt_ids": own[0].prompt, "replies": written})
    return rows
