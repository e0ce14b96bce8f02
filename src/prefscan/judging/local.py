"""A transformers model as judge: the probability of each verdict, without generating.

The reply is prefilled up to the place where FastChat's prompts ask for the verdict, `Rating: [[`. Each verdict is
scored by its own tokens, whatever the vocabulary makes of "10", and by the closing bracket that tells "1" from "10" and
"7" from "7.5". The mode makes one verdict of these probabilities: the expected score, or the most probable letter.

With `judge.batch_size: 1`, prompts are judged in the order of their tokens, and each takes over the keys and values of
what it shares with the one before it. Larger batches hold prompts of similar length, padded on the left, and share
nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.config import LocalJudge
from prefscan.common.errors import UserError
from prefscan.judging.judge import Mode, Prompt, Verdict, mode_of
from prefscan.models.chat import prompt_ids
from prefscan.models.loading import load_model, load_tokenizer

CLOSING = "]"
PROBE = "prefscan-system-probe"


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


class TokenJudge:
    """Judges by the probabilities of a mode's options, under a causal language model with a chat template."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: Mode, settings: LocalJudge
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.mode = mode
        self.batch_size = settings.batch_size
        self.least_mass = settings.least_mass
        self.prefill, self.options = self._options()
        self.closing = [id for token, id in tokenizer.get_vocab().items() if token.startswith(CLOSING)]
        # The places whose next token is read: after the prefill, (), and after each part of an option.
        ends = {tuple(tokens[:i]) for tokens, closed in self.options for i in range(len(tokens) + (not closed))}
        self.places = sorted(ends)
        self.folded = not self._knows_system()
        if self.folded:
            print("judge.folder: the chat template has no system role; the system text opens the user's turn")

    def _options(self) -> tuple[str, list[tuple[list[int], bool]]]:
        """What all options share of the reply, and each one's own tokens, with whether these hold a closing bracket.

        They share the prefill, or less of it where the vocabulary has a token of its end with what follows.
        """
        opening, encoded = self.mode.prefill, []
        for option in self.mode.options:
            found = self.tokenizer(f"{opening}{option}{CLOSING}", add_special_tokens=False, return_offsets_mapping=True)
            end = len(opening) + len(option)
            spans = [(token, span) for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]
            encoded.append((end, [(token, span) for token, span in spans if span[0] < end]))
        shared = min(len(spans) - 1 for _, spans in encoded)
        first = encoded[0][1]
        while any(
            [token for token, _ in spans[:shared]] != [token for token, _ in first[:shared]] for _, spans in encoded
        ):
            shared -= 1
        text = opening[: first[shared - 1][1][1]] if shared else ""
        options = [([token for token, _ in spans[shared:]], spans[-1][1][1] > end) for end, spans in encoded]
        return text, options

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens(self, prompt: Prompt) -> list[int]:
        """The chat with the prefilled reply; raises UserError where it does not fit the judge's context."""
        ids = self._chat(prompt.system, prompt.user)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.places))
        if limit is not None and len(ids) + longest > limit:
            raise UserError(
                f"judge.folder: a prompt of {len(ids)} tokens exceeds the judge's context of {limit}; choose another "
                "judge, or set answer.max_new_tokens lower"
            )
        return ids

    def _knows_system(self) -> bool:
        """Whether the template takes a system text; some refuse it, some leave it out in silence."""
        try:
            return PROBE in self._rendered([{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}])
        except TemplateError:
            return False

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _chat(self, system: str, user: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if self.folded:
            messages = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
        try:
            return prompt_ids(self.tokenizer, messages, prefill=self.prefill)
        except UserError as error:
            raise UserError(f"judge.folder: {error}; choose another local judge") from None

    @torch.no_grad()
    def probabilities(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """Probability of each option, shape `[options]`; they sum to the judge's probability of giving a verdict.

        `cache` holds the keys and values of a proper prefix of `ids`; afterwards those of `ids`.
        """
        return self._of_options(cache, torch.tensor([ids[cache.get_seq_length() :]]))[0]

    @torch.no_grad()
    def batch_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The same of several prompts at once, shape `[len(rows), options]`."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return self._of_options(DynamicCache(), ids, mask)

    def _of_options(self, cache: DynamicCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the options after `ids`, shape `[rows, options]`; leaves `cache` with those of `ids`."""
        following = {}
        for place in self.places:  # the first is (), after the prompt itself
            fed = torch.tensor([place] * len(ids)) if place else ids
            following[place] = self._following(cache, fed, mask)
            if place:
                cache.crop(-len(place))
            elif mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(ids), max(map(len, self.places)))], 1)
        found = []
        for tokens, closed in self.options:
            p = torch.ones(len(ids), dtype=torch.float64)
            for i, token in enumerate(tokens):
                p = p * following[tuple(tokens[:i])][:, token]
            found.append(p if closed else p * following[tuple(tokens)][:, self.closing].sum(-1))
        return torch.stack(found, 1)

    def _following(self, cache: DynamicCache, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Probabilities of the next token after `cache` and `ids`, shape `[rows, vocabulary]`."""
        inputs = {"input_ids": ids}
        if mask is not None:
            length = cache.get_seq_length() + ids.shape[1]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs |= {"attention_mask": mask[:, :length], "position_ids": positions[:, length - ids.shape[1] : length]}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].double().softmax(-1).cpu()

    def one_by_one(self, encoded: Sequence[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """The place and the probabilities of each prompt, in the order of the prompts' tokens."""
        cache = DynamicCache()  # without the model's config: every layer keeps all positions, and so can be cropped
        previous: list[int] = []
        for place in sorted(range(len(encoded)), key=encoded.__getitem__):
            ids = encoded[place]
            shared = common(previous, ids[:-1])  # at least the last token is left, to predict from
            if surplus := cache.get_seq_length() - shared:
                cache.crop(-surplus)  # that many tokens from the end
            yield place, self.probabilities(ids, cache)
            previous = ids

    def in_batches(self, encoded: Sequence[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """The place and the probabilities of each prompt, longest first: too little memory shows at once."""
        order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            yield from zip(places, self.batch_probabilities([encoded[place] for place in places]), strict=True)

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        prompts = list(prompts)
        encoded = [self.tokens(prompt) for prompt in prompts]
        judged = self.one_by_one(encoded) if self.batch_size == 1 else self.in_batches(encoded)
        for place, probabilities in judged:
            mass = probabilities.sum().item()
            if not mass >= self.least_mass:  # NaN, of a model that overflows, as well
                reason = (
                    f"the judge gives any verdict with probability {mass:.1e} only, under judge.least_mass "
                    f"({self.least_mass})"
                )
                yield place, Verdict(None, "", reason, mass=None if mass != mass else mass)
                continue
            yield place, replace(self.mode.choose(probabilities.tolist()), mass=mass)


def make(judge: LocalJudge) -> TokenJudge:
    folder = Path(judge.folder)
    return TokenJudge(load_model(folder, judge.dtype), load_tokenizer(folder), mode_of(judge), judge)
