"""The LoRA adapter of a cell, and a layer for it whose product is one function.

y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (Hu et al. 2021, arXiv 2106.09685, equation 3). PEFT writes the second term to memory, scales
it and adds it, each time at the output's size, and so does the backward pass with its gradients. Here both are
accumulated into the product of the frozen weight.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefscan.common.config import Train
from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import load_layout


class LoraProduct(torch.autograd.Function):
    """x `[…, in]`, frozen W `[out, in]` and b `[out]` or None, A `[r, in]`, B `[out, r]`, s; gives y `[…, out]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling
        y: Tensor = nn.functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scaling)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, down, up, low = ctx.saved_tensors
        (grad,) = grad_outputs
        slopes = grad.reshape(-1, grad.shape[-1])
        low_slopes = (slopes @ up).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (slopes @ weight).addmm_(low_slopes, down).view(*grad.shape[:-1], -1)
        return grad_x, None, None, low_slopes.T @ rows, (slopes.T @ low).mul_(ctx.scaling), None


class FusedLora(PeftLinear):
    """PEFT's layer over a frozen `nn.Linear`, for one adapter without extras.

    It computes `LoraProduct`, and what PEFT does where that is something else: adapter disabled or merged, dropout
    acting, tensors of several dtypes, autocast.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = self.active_adapters
        base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or (dropout.training and getattr(dropout, "p", 0.0) > 0)
            or not x.dtype == base.weight.dtype == down.dtype == up.dtype
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])
        return y


def is_target(name: str, targets: list[str]) -> bool:
    """As PEFT takes `target_modules`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def refuse_targets(model: Any, targets: list[str]) -> None:
    """Raises UserError for a target that is no module of the model, and for the LM head.

    PEFT refuses an unknown one only where all are. An adapter of the head, or of embeddings that share its weight, is
    left out of the log-probabilities: the layouts compute them from the weight alone.
    """
    head = model.get_output_embeddings().weight
    modules = {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not head}
    if absent := [target for target in targets if not any(is_target(name, [target]) for name in modules)]:
        linear = sorted({name.split(".")[-1] for name, module in modules.items() if isinstance(module, nn.Linear)})
        raise UserError(
            f"train.lora.target_modules: the model has no {', '.join(absent)} to tune; it has {', '.join(linear)}"
        )


def beside_text(model: Any, targets: list[str]) -> list[str]:
    """The targets outside of the text decoder where others are within, as in a vision tower, which no pair passes."""
    text = set(model.get_decoder().modules())
    found = {name: module in text for name, module in model.named_modules() if is_target(name, targets)}
    return [name for name, within in found.items() if not within] if any(found.values()) else []


def refuse_unmergeable(policy: nn.Module) -> None:
    """Raises UserError for an adapted layer whose adapter cannot become a change of its weight, as a merge makes it."""
    for name, layer in policy.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        try:
            with torch.no_grad():
                deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
            packed = type(base).__name__ == "Linear4bit"  # is merged in full precision, where its weight has its shape
            fits = packed or all(delta.shape == base.weight.shape for delta in deltas)
            reason = "" if fits else "its change has another shape than the weight"
        except Exception as error:  # whatever PEFT raises for a kind of layer
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if reason:
            raise UserError(
                f"train.lora.target_modules: the adapter of {name}, a {type(base).__name__}, could not be merged "
                f"({reason}); leave {name.split('.')[-1]} out"
            )


def lora_config(train: Train, leave_out: list[str] | None = None) -> LoraConfig:
    """PEFT's configuration of `train.lora`. Layout `packed` brings a layer of its own, for whole weights."""
    lora = train.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=leave_out or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    if load_layout(train.layout).FUSED_LORA and train.bnb_4bit_quant_type == "none" and not train.accelerate:
        config._register_custom_module({nn.Linear: FusedLora})
    return config
