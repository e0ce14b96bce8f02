"""Every preference loss, as a pure function of log-probabilities.

Notation, for a micro-batch of B pairs, all tensors of shape `[B]`, in nats:

- `chosen`, `rejected`: log π(y|x) of the policy, summed over the tokens of the response;
- `ref_chosen`, `ref_rejected`: the same under the reference, the untuned base model;
- `chosen_tokens`, `rejected_tokens`: the number of tokens of each response.

The *log-ratio* of a response is h = log π(y|x) − log π_ref(y|x); its *reward* is β·h.
A loss returns one value a pair, shape `[B]`; the trainer takes the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a micro-batch of pairs: each field has shape `[B]`; see the module's text for the names."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


def sigmoid(logps: PairLogps, beta: float) -> Tensor:
    """DPO: −log σ(β(h_w − h_l)).

    Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), equation 7. β is the strength of the
    KL constraint of the RLHF objective: the larger, the closer the optimum stays to the reference.
    """
    return -F.logsigmoid(beta * (logps.chosen_logratio - logps.rejected_logratio))


def ipo(logps: PairLogps, beta: float) -> Tensor:
    """IPO on log-probabilities averaged over tokens: (h̄_w − h̄_l − 1/(2β))².

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (arXiv 2310.12036),
    equation 17, with τ = β. The average over tokens is what TRL has computed since 0.7.11, after the study's authors
    and IPO's found that summing made β depend on the length; `ipo_sum` keeps the sum.
    """
    margin = logps.chosen_logratio / logps.chosen_tokens - logps.rejected_logratio / logps.rejected_tokens
    return (margin - 1 / (2 * beta)) ** 2


def ipo_sum(logps: PairLogps, beta: float) -> Tensor:
    """IPO on summed log-probabilities: (h_w − h_l − 1/(2β))², as TRL computed it up to 0.7.10.

    The formula of arXiv 2310.12036, equation 17, read without the average over tokens: the study published its first
    figures with it and corrected them later. Kept to reproduce both.
    """
    return (logps.chosen_logratio - logps.rejected_logratio - 1 / (2 * beta)) ** 2


def kto_pair(logps: PairLogps, beta: float) -> Tensor:
    """KTO on pairs: the mean of 1 − σ(β(h_w − KL_l)) and 1 − σ(β(KL_w − h_l)), KL_x = max(0, mean of h_x).

    Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv 2402.01306), in the paired form
    of TRL 0.7 (removed in 0.9.5): the chosen responses are the desirable examples, the rejected the undesirable ones,
    and each KL is estimated as the mean log-ratio of the *other* half of the micro-batch, clamped at 0 and **not**
    detached. The value of a pair therefore depends on the micro-batch. β is the risk aversion of the value function.
    """
    kl_chosen = logps.chosen_logratio.mean().clamp(min=0)
    kl_rejected = logps.rejected_logratio.mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (logps.chosen_logratio - kl_rejected))
    undesirable = 1 - torch.sigmoid(beta * (kl_chosen - logps.rejected_logratio))
    return (desirable + undesirable) / 2


LOSSES: dict[str, Callable[[PairLogps, float], Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "kto_pair": kto_pair,
}
