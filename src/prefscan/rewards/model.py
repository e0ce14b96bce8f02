"""A reward model: a transformers sequence classifier with one output, under its own chat template.

The utility and the score are the output itself, as such models are trained: a difference of 1 is one nat of log-odds
under Bradley and Terry. A text's number is that of a plain forward pass of it alone, up to rounding: rows are padded on
the right with the pad token of the model's configuration, which its pooling looks for, so that no position moves.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from prefscan.common.config import ModelReward
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl
from prefscan.models.loading import DTYPES, device
from prefscan.rewards.checks import accuracy_interval, rounded
from prefscan.rewards.reward import Prompt, Reward


class RewardModel(Reward):
    utility_name = score_name = "output of the reward model"

    def __init__(self, name: str, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.name = name
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.pad_id: int = model.config.get_text_config().pad_token_id
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)

    @classmethod
    def load(cls, folder: Path, settings: ModelReward) -> "RewardModel":
        """Raises UserError for what is no reward model, and for one that would run code of its own."""
        _refuse_code(folder)
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder} has no safetensors file; prefscan loads nothing else, since other weight formats can run "
                "code: choose another reward.source"
            )
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} has no configuration and tokenizer that load ({' '.join(str(error).split()):.150}); choose "
                "another reward.source"
            ) from None
        if config.num_labels != 1:
            raise UserError(
                f"{folder}/config.json: num_labels is {config.num_labels}; a reward model has 1 output, choose another "
                "reward.source"
            )
        if not tokenizer.chat_template:
            raise UserError(
                f"{folder}: the tokenizer has no chat template, and prefscan never guesses one; choose another "
                "reward.source"
            )
        if config.get_text_config().pad_token_id is None:
            raise UserError(
                f"{folder}/config.json names no pad_token_id, so the model cannot tell where a text of a batch ends; "
                "set it to the token that padded its training texts"
            )
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=DTYPES[settings.dtype],
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} holds no sequence classifier that loads ({' '.join(str(error).split()):.150}); choose "
                "another reward.source"
            ) from None
        if info["missing_keys"]:  # transformers would draw them at random, as the head of a chat model without one
            raise UserError(
                f"{folder} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}; it is no trained reward "
                "model, choose another reward.source"
            )
        return cls(settings.name, model.to(device()), tokenizer, settings.batch_size)

    def encode(self, prompt: Prompt, reply: str, number: int = 1) -> list[int]:
        """Tokens of prompt and reply under the chat template; a control token that a text spells out stays text.

        Raises UserError where the template refuses the chat or leaves out a text of it, and for more tokens than the
        model takes: nothing is truncated.
        """
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        chat.append({"role": "assistant", "content": reply})
        place = f"reward {self.name}: reply {number} ({reply!r:.60})"
        try:
            rest = str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        except TemplateError as error:
            raise UserError(
                f"{place}: the chat template refuses the chat ({' '.join(str(error).split()):.150}); choose another "
                "reward.source"
            ) from None
        pieces: list[tuple[str, bool]] = []  # text, and whether it is the template's own
        for message in chat:
            content = message["content"].strip()  # templates may strip; white space is not missed
            if not content:
                continue
            before, found, after = rest.rpartition(content) if message is chat[-1] else rest.partition(content)
            if not found:
                raise UserError(
                    f"{place}: the chat template leaves out the {message['role']}'s {content!r:.60}; choose another "
                    "reward.source"
                )
            pieces += [(before, True), (content, False)]
            rest = after
        pieces.append((rest, True))
        controls = self.tokenizer.all_special_tokens
        spelt = any(token in text for text, own in pieces if not own for token in controls)
        # In one piece where nothing is spelt: tokens may join text and template.
        parts = pieces if spelt else [("".join(text for text, _ in pieces), True)]
        ids = [
            token
            for text, own in parts
            if text
            for token in self.tokenizer(text, add_special_tokens=False, split_special_tokens=not own)["input_ids"]
        ]
        if len(ids) > self.longest:
            raise UserError(
                f"{place}: prompt and reply are {len(ids)} tokens, and the reward model takes {self.longest}; lower "
                "the length of replies, or choose another reward.source"
            )
        return ids

    @torch.inference_mode()
    def _utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        rows = [self.encode(p, r, n) for n, (p, r) in enumerate(zip(prompts, replies, strict=True), start=1)]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        utilities = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [self.pad_id] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            place = self.model.device
            logits = self.model(input_ids=ids.to(place), attention_mask=mask.to(place)).logits
            for i, value in zip(batch, logits[:, 0].float().tolist(), strict=True):
                utilities[i] = value
        return utilities


def _refuse_code(folder: Path) -> None:
    """Raises UserError for a folder that is missing, or whose configuration names classes of its own."""
    if not folder.is_dir():  # transformers would take the path for a repository of the hub, and ask for it
        raise UserError(f"{folder} is missing; run `dvc repro` to make it, or `dvc pull` to fetch it")
    for name in ("config.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).exists() else {}
        if isinstance(config, dict) and config.get("auto_map"):
            raise UserError(
                f"{folder}/{name}: auto_map {config['auto_map']!r:.100} is code of the model's own, which prefscan "
                "never runs; choose a model that transformers knows"
            )


def read_known_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows `{"prompt", "chosen", "rejected"}` of a JSON-lines file; the prompt is text or the messages of a chat.

    Raises UserError for an empty file and for a row of another shape.
    """
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} holds no pair; give pairs with known order, or set reward.pairs: null")
    for number, row in enumerate(rows, start=1):
        texts: list[Any] = []
        with suppress(KeyError, TypeError):
            texts = [row["chosen"], row["rejected"]]
            prompt = row["prompt"]
            texts += [prompt] if isinstance(prompt, str) else [m[key] for m in prompt for key in ("role", "content")]
        if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{path}, row {number}: expected prompt (text or messages), chosen and rejected, found {row!r:.100}; "
                "correct or remove the row"
            )
    return rows


def check_pairs(reward: Reward, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of pairs whose chosen reply has the higher utility, ties half, with Wilson's 95 % interval."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (reward.utilities(prompts, [pair[key] for pair in pairs]) for key in ("chosen", "rejected"))
    right = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    return {
        "pairs": len(pairs),
        "ties": right.count(0.5),
        "accuracy": rounded(accuracy_interval(right, range(len(pairs)))),
    }
