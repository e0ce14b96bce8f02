"""A transformers model as judge: the expected score from token probabilities, without generating.

G-Eval (Liu et al., arXiv 2303.16634, equation 1): Σ p(s)·s over the scores s = 1 … 10. The reply is prefilled up to
`Rating: [[`, the place where FastChat's prompts ask for the number, and one forward pass gives p(s). "1" is a score of
its own and the first token of "10", so a second pass, of one token, splits its probability.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.errors import UserError
from prefscan.judges import Prompt, Verdict
from prefscan.models import load_model, load_tokenizer
from prefscan.params import LocalJudge

PREFILL = "Rating: [["
LEAST_MASS = 1e-3  # under this probability of any score, an expectation over scores means nothing


class ExpectedScore:
    """Scores by expectation under a causal language model with a chat template."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.digits = [self._single_token(str(digit)) for digit in range(10)]

    def _single_token(self, digit: str) -> int:
        prefix = self._encode(PREFILL)
        tokens = self._encode(PREFILL + digit)
        if tokens[:-1] != prefix:
            raise UserError(
                f"judge.folder: the tokenizer merges {digit!r} into {PREFILL!r}; choose another local judge"
            )
        return tokens[-1]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def probabilities(self, prompt: Prompt) -> Tensor:
        """Probability of each score 1 … 10, shape `[10]`; they sum to the judge's probability of giving a score."""
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids = torch.tensor([self._encode(text + PREFILL)], device=self.model.device)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] >= limit:
            raise UserError(f"judge.folder: a prompt of {ids.shape[1]} tokens exceeds the judge's context of {limit}")
        first = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        start = first.logits[0, -1].double().softmax(-1)
        one = torch.tensor([[self.digits[1]]], device=self.model.device)
        second = self.model(input_ids=one, past_key_values=first.past_key_values, logits_to_keep=1)
        ten = start[self.digits[1]] * second.logits[0, -1].double().softmax(-1)[self.digits[0]]
        scores = torch.stack([*start[self.digits[1:]], ten]).cpu()
        scores[0] -= scores[9]
        return scores

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        for place, prompt in enumerate(prompts):
            scores = self.probabilities(prompt)
            mass = scores.sum().item()
            if not mass >= LEAST_MASS:  # NaN, of a model that overflows, as well
                yield place, Verdict(None, "", f"the judge gives any score with probability {mass:.1e} only")
                continue
            expected = (scores / mass @ torch.arange(1.0, 11.0, dtype=torch.float64)).item()
            yield place, Verdict(expected, f"{PREFILL}{expected:.4f}]] (expected score; P(any score) = {mass:.3f})")


def make(judge: LocalJudge) -> ExpectedScore:
    folder = Path(judge.folder)
    return ExpectedScore(load_model(folder, judge.dtype), load_tokenizer(folder))
