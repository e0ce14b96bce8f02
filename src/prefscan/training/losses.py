"""Every preference loss, as a pure function of log-probabilities, and the registry of them.

    prefscan losses > docs/losses.md

Notation, for a micro-batch of B pairs, all tensors of shape `[B]`, in nats:

- `chosen`, `rejected`: p_w and p_l, log π(y|x) of the policy, summed over the tokens of the response;
- `ref_chosen`, `ref_rejected`: the same under the reference, the untuned base model;
- `chosen_tokens`, `rejected_tokens`: n_w and n_l, the number of tokens of each response.

The *log-ratio* of a response is h = log π(y|x) − log π_ref(y|x), h_w of the chosen and h_l of the rejected; its
*reward* is β·h. A bar divides by the response's own tokens: p̄_w = p_w / n_w, h̄_l = h_l / n_l. σ is the logistic
function. A loss returns one value a pair, shape `[B]`; the trainer takes the mean.

A loss that needs no reference trains without one. The cell's reward margins and held-out metrics are against the base
all the same, so its train stage reads what the reference stage wrote, as every other does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import cleandoc, signature

import torch
import torch.nn.functional as F
from torch import Tensor

from prefscan.common.config import Params
from prefscan.common.errors import UserError


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a micro-batch of pairs: each field has shape `[B]`; see the module's text for the names.

    `kl_logratio`, for `kto` alone, is the mean log-ratio of another prompt's two responses under each prompt.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    kl_logratio: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """h_w − h_l"""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def margin_per_token(self) -> Tensor:
        """h̄_w − h̄_l"""
        return self.chosen_logratio / self.chosen_tokens - self.rejected_logratio / self.rejected_tokens

    def of_reference(self) -> "PairLogps":
        """The same pairs under a policy that is the reference."""
        return replace(
            self,
            chosen=self.ref_chosen,
            rejected=self.ref_rejected,
            kl_logratio=None if self.kl_logratio is None else torch.zeros_like(self.kl_logratio),
        )

    @property
    def chosen_nll(self) -> Tensor:
        """−p_w over the micro-batch's mean n_w, so that the mean over the pairs is the mean over all chosen tokens."""
        return -self.chosen * len(self.chosen) / self.chosen_tokens.sum()


@dataclass(frozen=True)
class Loss:
    """A loss as the trainer calls it, and what docs/losses.md says of it beside the function's own text."""

    function: Callable[..., Tensor]
    formula: str
    paper: str
    beta: str  # what β means
    reference: bool  # whether the function reads ref_chosen and ref_rejected
    batch_dependent: bool  # whether the value of a pair depends on the other pairs of the micro-batch
    mismatched: bool  # whether the function reads kl_logratio, which costs two forward passes more

    @property
    def options(self) -> list[str]:
        """Its hyperparameters: the keys of its own section of losses in params.yaml."""
        return list(signature(self.function).parameters)[2:]

    def __call__(self, logps: PairLogps, beta: float, options: object) -> Tensor:
        """The loss of each pair, shape `[B]`; its hyperparameters are attributes of `options`."""
        return self.function(logps, beta, **{name: getattr(options, name) for name in self.options})


LOSSES: dict[str, Loss] = {}


def register(
    *,
    formula: str,
    paper: str,
    beta: str,
    reference: bool = True,
    batch_dependent: bool = False,
    mismatched: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add the function to LOSSES under its own name."""

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[function.__name__] = Loss(function, formula, paper, beta, reference, batch_dependent, mismatched)
        return function

    return add


# The losses of TRL 1.16's DPOTrainer, in its order -------------------------------------------------


@register(
    formula="−log σ(β(h_w − h_l))",
    paper="[DPO](https://arxiv.org/abs/2305.18290), equation 7",
    beta="strength of RLHF's KL constraint: the larger, the closer the optimum stays to the reference",
)
def sigmoid(logps: PairLogps, beta: float) -> Tensor:
    """DPO: logistic regression on the difference of the rewards."""
    return -F.logsigmoid(beta * logps.margin)


@register(
    formula="max(0, 1 − β(h_w − h_l))",
    paper="[SLiC-HF](https://arxiv.org/abs/2305.10425), section 2, on log-ratios as in "
    "[RSO](https://arxiv.org/abs/2309.06657) (hinge-norm)",
    beta="1 / the margin in nats from which a pair costs nothing",
)
def hinge(logps: PairLogps, beta: float) -> Tensor:
    """SLiC's hinge, normalised by the reference. SLiC's own has no reference and adds a cross-entropy term."""
    return torch.relu(1 - beta * logps.margin)


@register(
    formula="(h̄_w − h̄_l − 1/(2β))²",
    paper="[IPO](https://arxiv.org/abs/2310.12036), equation 17",
    beta="the paper's τ: the target of the margin is 1/(2β) nats a token",
)
def ipo(logps: PairLogps, beta: float) -> Tensor:
    """IPO on log-probabilities averaged over tokens.

    The average over tokens is what TRL has computed since 0.7.11, after the study's authors and IPO's found that
    summing made β depend on the length; `ipo_sum` keeps the sum.
    """
    return (logps.margin_per_token - 1 / (2 * beta)) ** 2


@register(
    formula="σ(m)·(log σ(m) − log(1 − ε)) + σ(−m)·(log σ(−m) − log ε), m = β(h_w − h_l)",
    paper="[EXO](https://arxiv.org/abs/2402.00856), equation 16",
    beta="factor on the log-ratios in the softmax over the pair, which is drawn to (1 − ε, ε)",
)
def exo_pair(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """EXO for two responses: reverse KL from the policy's softmax over the pair to the label's, smoothed by ε.

    Smallest, 0, at β(h_w − h_l) = log((1 − ε)/ε): beyond it a likelier chosen response costs.
    """
    logit = beta * logps.margin
    chosen = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(label_smoothing))
    return chosen + rejected


@register(
    formula="−log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l)",
    paper="[NCA](https://arxiv.org/abs/2402.05369), section 4.1",
    beta="the paper's α: strength of the KL constraint, as in DPO; 0.01 there",
)
def nca_pair(logps: PairLogps, beta: float) -> Tensor:
    """NCA for pairs: each response against noise, so that the chosen one's own likelihood is kept up.

    Smallest in h_w at βh_w = log 2: beyond it a likelier chosen response costs.
    """
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@register(
    formula="(ε log σ(−m) − (1 − ε) log σ(m)) / (1 − 2ε), m = β(h_w − h_l)",
    paper="[Robust DPO](https://arxiv.org/abs/2403.00409), section 3.1",
    beta="as in DPO; 0.01 in the paper",
)
def robust(logps: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """DPO made unbiased for labels of which a share ε is flipped. It may be negative."""
    logit = beta * logps.margin
    clean, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@register(
    formula="−log σ(βh_w) − log σ(−βh_l)",
    paper="[BCO](https://arxiv.org/abs/2404.04656), section 4",
    beta="strength of the KL constraint, as in DPO; 0.01 in the paper",
)
def bco_pair(logps: PairLogps, beta: float) -> Tensor:
    """BCO for pairs: a classifier of single responses, whose logit is the reward.

    The paper's reward shift δ, a running mean over batches, is 0 here, as it is in TRL 1.16: the loss keeps no state.
    """
    return -F.logsigmoid(beta * logps.chosen_logratio) - F.logsigmoid(-beta * logps.rejected_logratio)


@register(
    formula="(h_w − 1/(2β))² + (h_l + 1/(2β))²",
    paper="[SPPO](https://arxiv.org/abs/2405.00675), equation 4.7 with P = 1 for the chosen and 0 for the rejected",
    beta="1 / the paper's η: the targets of the log-ratios are ±1/(2β) nats; 0.001 in the paper",
)
def sppo_hard(logps: PairLogps, beta: float) -> Tensor:
    """SPPO with hard labels: each log-ratio is drawn to its own target, in squared nats."""
    return (logps.chosen_logratio - 1 / (2 * beta)) ** 2 + (logps.rejected_logratio + 1 / (2 * beta)) ** 2


@register(
    formula="−log σ(βδ), δ = sorted(p_w − p_l) − sorted(the same of the reference)",
    paper="[AOT](https://arxiv.org/abs/2406.05882), section 3, paired",
    beta="as in DPO, on quantiles of the micro-batch",
    batch_dependent=True,
)
def aot(logps: PairLogps, beta: float) -> Tensor:
    """AOT for paired data: DPO between the sorted margins of policy and reference, quantile by quantile.

    The values belong to the micro-batch's quantiles in rising order, not to its pairs. One pair alone is DPO.
    """
    policy, reference = logps.chosen - logps.rejected, logps.ref_chosen - logps.ref_rejected
    return -F.logsigmoid(beta * (policy.sort().values - reference.sort().values))


@register(
    formula="−log σ(βδ), δ = sorted(h_w) − sorted(h_l)",
    paper="[AOT](https://arxiv.org/abs/2406.05882), section 3, unpaired",
    beta="as in DPO, on quantiles of the micro-batch",
    batch_dependent=True,
)
def aot_unpaired(logps: PairLogps, beta: float) -> Tensor:
    """AOT for unpaired data: DPO between the sorted log-ratios of chosen and rejected, quantile by quantile.

    The values belong to the micro-batch's quantiles in rising order, not to its pairs. One pair alone is DPO.
    """
    return -F.logsigmoid(beta * (logps.chosen_logratio.sort().values - logps.rejected_logratio.sort().values))


@register(
    formula="1 − σ(βh_w) + σ(βh_l)",
    paper="[APO](https://arxiv.org/abs/2408.06266), equation 7",
    beta="as in DPO: slope of the reward",
)
def apo_zero(logps: PairLogps, beta: float) -> Tensor:
    """APO-zero: up with the chosen and down with the rejected; for chosen responses better than the model's own."""
    return torch.sigmoid(-beta * logps.chosen_logratio) + torch.sigmoid(beta * logps.rejected_logratio)


@register(
    formula="σ(βh_w) + 1 − σ(β(h_w − h_l))",
    paper="[APO](https://arxiv.org/abs/2408.06266), equation 8",
    beta="as in DPO: slope of the reward",
)
def apo_down(logps: PairLogps, beta: float) -> Tensor:
    """APO-down: down with both, and further with the rejected; for chosen responses worse than the model's own."""
    return torch.sigmoid(beta * logps.chosen_logratio) + torch.sigmoid(-beta * logps.margin)


@register(
    formula="(1 − σ(m/τ))·(−log σ(m)) + σ(m/τ)·e^(−m), m = β(h_w − h_l)",
    paper="[DiscoPOP](https://arxiv.org/abs/2406.08414), equation 5",
    beta="as in DPO; 0.05 in the paper",
)
def discopop(logps: PairLogps, beta: float, tau: float) -> Tensor:
    """DiscoPOP: logistic at a negative margin, exponential at a positive one, mixed over a width of τ.

    Not monotone where τ is below 0.11, and below 0.102 a lower margin pays at the start, where every margin is 0. At
    τ = 0.05 the loss has a dip at β(h_w − h_l) = −0.12 and a hump at 0.07, which a pair must pass before its margin
    grows.
    """
    logit = beta * logps.margin
    # The exponential overflows where its weight underflows; their product, in one exponent, does not.
    exponential = torch.exp(F.logsigmoid(logit / tau) - logit)
    return torch.sigmoid(-logit / tau) * -F.logsigmoid(logit) + exponential


@register(
    formula="−p_w / (mean of n_w over the micro-batch)",
    paper="supervised fine-tuning; the third term of [MPO](https://arxiv.org/abs/2411.10442)",
    beta="not used",
    reference=False,
    batch_dependent=True,
)
def sft(logps: PairLogps, beta: float) -> Tensor:
    """Cross-entropy of the chosen responses alone, in which every token of the micro-batch weighs the same."""
    return logps.chosen_nll


@register(
    formula="−log σ(β(h̄_w − h̄_l))",
    paper="[Tülu 3](https://arxiv.org/abs/2411.15124), section 5, length-normalized DPO",
    beta="as in DPO, on nats a token: the same constraint needs a larger β; 5 in the paper",
)
def sigmoid_norm(logps: PairLogps, beta: float) -> Tensor:
    """DPO on log-ratios averaged over the tokens of each response."""
    return -F.logsigmoid(beta * logps.margin_per_token)


# What TRL computed once, for the study's figures ---------------------------------------------------


@register(
    formula="(h_w − h_l − 1/(2β))²",
    paper="[IPO](https://arxiv.org/abs/2310.12036), equation 17, as TRL computed it up to 0.7.10",
    beta="the paper's τ: the target of the margin is 1/(2β) nats",
)
def ipo_sum(logps: PairLogps, beta: float) -> Tensor:
    """IPO on summed log-probabilities.

    The formula of the paper read without the average over tokens: the study published its first figures with it and
    corrected them later. Kept to reproduce both.
    """
    return (logps.margin - 1 / (2 * beta)) ** 2


@register(
    formula="½(1 − σ(β(h_w − z_l))) + ½(1 − σ(β(z_w − h_l))), z = max(0, mean of h over the micro-batch)",
    paper="[KTO](https://arxiv.org/abs/2402.01306), equation 7, in the paired form of TRL 0.7",
    beta="risk aversion of the value function: the larger, the sooner it saturates",
    batch_dependent=True,
)
def kto_pair(logps: PairLogps, beta: float) -> Tensor:
    """KTO on pairs, as TRL had it until 0.9.4.

    The chosen responses are the desirable examples, the rejected ones the undesirable, and each KL is estimated as the
    mean log-ratio of the *other* half of the micro-batch, clamped at 0 and **not** detached.
    """
    kl_chosen = logps.chosen_logratio.mean().clamp(min=0)
    kl_rejected = logps.rejected_logratio.mean().clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (logps.chosen_logratio - kl_rejected))
    undesirable = 1 - torch.sigmoid(beta * (kl_chosen - logps.rejected_logratio))
    return (desirable + undesirable) / 2


# Without a reference -------------------------------------------------------------------------------


@register(
    formula="−log σ(β(p̄_w − p̄_l) − γ)",
    paper="[SimPO](https://arxiv.org/abs/2405.14734), equation 6",
    beta="scale of the reward, in nats a token; γ/β is the target margin; 2 to 2.5 in the paper",
    reference=False,
)
def simpo(logps: PairLogps, beta: float, gamma: float) -> Tensor:
    """SimPO: DPO's logistic on log-probabilities averaged over tokens, with a target margin instead of a reference."""
    chosen, rejected = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register(
    formula="−p̄_w − β log σ(o_w − o_l), o = p̄ − log(1 − e^p̄)",
    paper="[ORPO](https://arxiv.org/abs/2403.07691), equations 6 and 7",
    beta="the paper's λ: weight of the odds-ratio term beside the cross-entropy; 0.1 for its Mistral",
    reference=False,
)
def orpo(logps: PairLogps, beta: float) -> Tensor:
    """ORPO: cross-entropy of the chosen response plus the log odds ratio, both on averages over its tokens.

    The cross-entropy is over the response. That of TRL's ORPOTrainer takes in the prompt's tokens and is averaged over
    those of the micro-batch.
    """

    def log_odds(average: Tensor) -> Tensor:
        # A response of probability 1 would have infinite odds.
        below_zero = average.clamp(max=-torch.finfo(average.dtype).eps)
        return below_zero - torch.log(-torch.expm1(below_zero))

    chosen, rejected = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@register(
    formula="−log σ(β(p_w − p_l)) − α p_w / (mean of n_w over the micro-batch)",
    paper="[CPO](https://arxiv.org/abs/2401.08417), equation 3 and its NLL term",
    beta="as in DPO, with a uniform reference; 0.1 in the paper",
    reference=False,
    batch_dependent=True,
)
def cpo(logps: PairLogps, beta: float, alpha: float) -> Tensor:
    """CPO: DPO without its reference, plus α times the cross-entropy of the chosen responses.

    The cross-entropy is the mean over the micro-batch's tokens, as in TRL's CPOTrainer; the paper writes it as a sum.
    """
    return alpha * logps.chosen_nll - F.logsigmoid(beta * (logps.chosen - logps.rejected))


# Without pairs -------------------------------------------------------------------------------------


@register(
    formula="½λ_D(1 − σ(β(h_w − z))) + ½λ_U(1 − σ(β(z − h_l))), z = max(0, mean of h of mismatched responses)",
    paper="[KTO](https://arxiv.org/abs/2402.01306), equation 7",
    beta="risk aversion of the value function: the larger, the sooner it saturates",
    batch_dependent=True,
    mismatched=True,
)
def kto(logps: PairLogps, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """KTO: each chosen response is a desirable example, each rejected one an undesirable, apart from each other.

    z estimates the KL, without gradient: the mean of h over the micro-batch's prompts, each with both responses of the
    next pair in the data that has another prompt. TRL's KTOTrainer takes another response of the micro-batch. The value
    of a pair is the mean of its two examples, so the mean over pairs is that of KTOTrainer over as many desirable as
    undesirable examples.
    """
    assert logps.kl_logratio is not None, "kto needs kl_logratio"
    kl = logps.kl_logratio.mean().clamp(min=0).detach()
    desirable = torch.sigmoid(-beta * (logps.chosen_logratio - kl))
    undesirable = torch.sigmoid(-beta * (kl - logps.rejected_logratio))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


def check_losses(params: Params) -> None:
    """Raises UserError for the first loss that losses.py does not define, or that has no section in losses."""
    known = f"known are {', '.join(LOSSES)}"
    sections = dict(params.losses)
    for name in [params.loss, *params.grid.loss]:
        if name not in LOSSES:
            raise UserError(f"params.yaml: grid.loss: {name!r} is no known loss; {known}")
        if name not in sections:
            raise UserError(
                f"params.yaml: losses.{name}: missing; add it to conf/losses/papers.yaml, as {{}} if the "
                "loss has no hyperparameters"
            )
    for name, section in sections.items():
        if name not in LOSSES:
            raise UserError(f"params.yaml: losses.{name}: no known loss; {known}")
        given, taken = set(type(section).model_fields), set(LOSSES[name].options)
        if given != taken:
            wanted = "give it a class with these" if taken else "take its class out"
            raise UserError(
                f"params.yaml: losses.{name}: its section has {', '.join(sorted(given)) or 'nothing'}, its "
                f"function takes {', '.join(sorted(taken)) or 'nothing'}; {wanted} in "
                "src/prefscan/common/config.py, where Losses names it"
            )


# docs/losses.md ------------------------------------------------------------------------------------


def document() -> str:
    """docs/losses.md: the table of the registry and each function's own text."""
    notation = cleandoc(__doc__).partition("\n\n")[2].partition("\n\n")[2]  # after the title and the command
    head = ["`sweep.loss`", "loss of a pair", "paper", "β", "`losses`", "reference needed", "batch-dependent"]
    rows = [
        [
            f"`{name}`",
            loss.formula,
            loss.paper,
            loss.beta,
            ", ".join(f"`{name}.{option}`" for option in loss.options) or "–",
            "yes" if loss.reference else "no",
            "yes" if loss.batch_dependent else "no",
        ]
        for name, loss in LOSSES.items()
    ]
    return "\n".join(
        [
            "# Losses",
            "",
            "Written by `prefscan losses > docs/losses.md`; change `src/prefscan/training/losses.py`, not this file.",
            "",
            notation,
            "",
            "The value of a pair under a batch-dependent loss depends on the other pairs of its micro-batch, so\n"
            "`train.per_device_train_batch_size` is part of the method.",
            "",
            *(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]),
            "",
            "## Each loss",
            *(f"\n### {name}\n\n{cleandoc(loss.function.__doc__ or '')}" for name, loss in LOSSES.items()),
        ]
    )


def main() -> None:
    print(document())
