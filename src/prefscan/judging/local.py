"""A transformers model as judge: the expected score from token probabilities, without generating.

G-Eval (Liu et al., arXiv 2303.16634, equation 1): Σ p(s)·s over the scores s = 1 … 10. The reply is prefilled up to
`Rating: [[`, the place where FastChat's prompts ask for the number, and one forward pass gives p(s). "1" is a score of
its own and the first token of "10", so the pass reads a "1" as well, and what may follow it splits its probability.

With `judge.batch_size: 1`, prompts are judged in the order of their tokens, and each takes over the keys and values of
what it shares with the one before it. Larger batches hold prompts of similar length, padded on the left, and share
nothing.

On a pair the reply is prefilled up to the verdict, and the most probable of A, B and C is taken.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.config import LocalJudge
from prefscan.common.errors import UserError
from prefscan.judging.judge import WINNERS, Prompt, Verdict
from prefscan.models.chat import prompt_ids
from prefscan.models.loading import load_model, load_tokenizer

LEAST_MASS = 1e-3  # under this probability of any verdict, an expectation or a choice means nothing


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


class TokenJudge(ABC):
    """Judges by the probabilities of the token after `prefill`, under a causal language model with a chat template."""

    prefill: str
    further: Sequence[int] = ()  # tokens that are read after the prefill, for what may follow them

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @abstractmethod
    def _of_verdicts(self, following: Tensor) -> Tensor:
        """Probabilities of the verdicts, shape `[rows, verdicts]`.

        From those of the token after the prefill and after each of the `further` ones, shape
        `[rows, 1 + len(further), vocabulary]`.
        """

    @abstractmethod
    def verdict(self, probabilities: Tensor) -> Verdict:
        """The verdict from probabilities of shape `[verdicts]`."""

    def _single_token(self, text: str) -> int:
        prefix = self._encode(self.prefill)
        tokens = self._encode(self.prefill + text)
        if tokens[:-1] != prefix:
            raise UserError(
                f"judge.folder: the tokenizer merges {text!r} into {self.prefill!r}; choose another local judge"
            )
        return tokens[-1]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens(self, prompt: Prompt) -> list[int]:
        """The chat with the prefilled reply; raises UserError where it does not fit the judge's context."""
        ids = self._chat(prompt.system, prompt.user)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"judge.folder: a prompt of {len(ids)} tokens exceeds the judge's context of {limit}; choose another "
                "judge, or set answer.max_new_tokens lower"
            )
        return ids

    def _chat(self, system: str, user: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return prompt_ids(self.tokenizer, messages, prefill=self.prefill)
        except UserError as error:
            raise UserError(f"judge.folder: {error}; choose another local judge") from None

    @torch.no_grad()
    def probabilities(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """Probability of each verdict, shape `[verdicts]`; they sum to the judge's probability of giving one.

        `cache` holds the keys and values of a proper prefix of `ids`; afterwards those of `ids` and of the further
        tokens.
        """
        rest = torch.tensor([[*ids[cache.get_seq_length() :], *self.further]])
        return self._of_verdicts(self._following(cache, rest))[0]

    @torch.no_grad()
    def batch_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The same of several prompts at once, shape `[len(rows), verdicts]`."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + [*row, *self.further] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * (len(row) + len(self.further)) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self._of_verdicts(self._following(DynamicCache(), ids, attention_mask=mask, position_ids=positions))

    def _following(self, cache: DynamicCache, ids: Tensor, **layout: Tensor) -> Tensor:
        """Probabilities of the token after each of the last places, shape `[rows, 1 + len(further), vocabulary]`."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in ({"input_ids": ids} | layout).items()}
        kept = 1 + len(self.further)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
        return logits[:, -kept:].double().softmax(-1).cpu()

    def one_by_one(self, encoded: Sequence[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """The place and the probabilities of each prompt, in the order of the prompts' tokens."""
        cache = DynamicCache()  # without the model's config: every layer keeps all positions, and so can be cropped
        previous: list[int] = []
        for place in sorted(range(len(encoded)), key=encoded.__getitem__):
            ids = encoded[place]
            shared = common(previous, ids[:-1])  # at least the last token is left, to predict from
            cache.crop(shared - cache.get_seq_length())  # by a negative number: that many tokens from the end
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
            if not mass >= LEAST_MASS:  # NaN, of a model that overflows, as well
                yield place, Verdict(None, "", f"the judge gives any verdict with probability {mass:.1e} only")
                continue
            yield place, self.verdict(probabilities)


class ExpectedScore(TokenJudge):
    """Σ p(s)·s over the scores s = 1 … 10."""

    prefill = "Rating: [["

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.digits = [self._single_token(str(digit)) for digit in range(10)]
        self.further = [self.digits[1]]

    def _of_verdicts(self, following: Tensor) -> Tensor:
        start, after_one = following.unbind(1)
        ten = start[:, self.digits[1]] * after_one[:, self.digits[0]]
        scores = torch.cat([start[:, self.digits[1:]], ten[:, None]], 1)
        scores[:, 0] -= ten
        return scores

    def verdict(self, probabilities: Tensor) -> Verdict:
        mass = probabilities.sum().item()
        expected = (probabilities / mass @ torch.arange(1.0, 11.0, dtype=torch.float64)).item()
        return Verdict(expected, f"{self.prefill}{expected:.4f}]] (expected score; P(any score) = {mass:.3f})")


class LikeliestWinner(TokenJudge):
    """The most probable of A, B and C, the first of equals."""

    prefill = "My final verdict is: [["

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.letters = [self._single_token(letter) for letter in WINNERS]

    def _of_verdicts(self, following: Tensor) -> Tensor:
        return following[:, 0, self.letters]

    def verdict(self, probabilities: Tensor) -> Verdict:
        letter = list(WINNERS)[int(probabilities.argmax())]
        shares = ", ".join(f"P({name}) = {p:.3f}" for name, p in zip(WINNERS, probabilities.tolist(), strict=True))
        return Verdict(WINNERS[letter], f"{self.prefill}{letter}]] ({shares})")


def make(judge: LocalJudge) -> TokenJudge:
    folder = Path(judge.folder)
    kind = {"single": ExpectedScore, "pair": LikeliestWinner}[judge.mode]
    return kind(load_model(folder, judge.dtype), load_tokenizer(folder), judge.batch_size)
