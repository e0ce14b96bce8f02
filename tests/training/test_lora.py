"""The layer against PEFT's own, and its gradients against finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prefscan.training.lora import FusedLora, LoraProduct

Policy = Any


def policies(dropout: float = 0.0, bias: bool = True) -> tuple[Policy, Policy]:
    """Two linear layers under the same adapter: with PEFT's own layer, and with ours."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=bias)).requires_grad_(False)
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0", "1"])
        if fused:
            config._register_custom_module({nn.Linear: FusedLora})
        policy = get_peft_model(base, config)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        found.append(policy)
    ours = [module for module in found[1].modules() if isinstance(module, FusedLora)]
    assert len(ours) == 2
    return found[0], found[1]


def output_and_gradients(policy: Policy, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # for dropout
    y = policy(x)
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in policy.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 5, 24)])
def test_it_computes_what_pefts_layer_does(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape)
    peft, ours = (output_and_gradients(policy, x) for policy in policies(bias=bias))
    assert len(peft) == len(ours) == 6  # with A and B of two layers
    for expected, found in zip(peft, ours, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(3)
    x, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: LoraProduct.apply(x, weight, bias, a, b, 0.7), (x, down, up))


def disable(policy: Policy) -> None:
    policy.base_model.disable_adapter_layers()


def merge(policy: Policy) -> None:
    policy.merge_adapter()


def widen_the_adapter(policy: Policy) -> None:
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.double()


@pytest.mark.parametrize("change", [disable, merge, widen_the_adapter])
def test_it_is_pefts_layer_where_the_product_is_another(change: Callable[[Policy], None]) -> None:
    x = torch.linspace(-1, 1, 72).view(3, 24)
    with torch.no_grad():
        peft, ours = policies()
        plain = ours(x)
        for policy in (peft, ours):
            change(policy)
        assert torch.equal(ours(x), peft(x))
        if change is disable:
            assert not torch.allclose(ours(x), plain)


def test_dropout_acts_in_training_and_in_training_alone() -> None:
    x = torch.linspace(-1, 1, 240).view(10, 24)
    peft, ours = policies(dropout=0.5)
    for expected, found in zip(output_and_gradients(peft, x), output_and_gradients(ours, x), strict=True):
        assert torch.equal(found, expected)
    dropped = ours(x)
    torch.testing.assert_close(ours.eval()(x), peft.eval()(x))
    assert not torch.allclose(ours(x), dropped)


def test_autocast_rounds_as_in_pefts_layer() -> None:
    x = torch.linspace(-1, 1, 240).view(10, 24)
    peft, ours = policies()
    with torch.autocast("cpu", torch.bfloat16):
        for expected, found in zip(output_and_gradients(peft, x), output_and_gradients(ours, x), strict=True):
            assert torch.equal(found, expected)


def test_nothing_of_the_outputs_size_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    _, ours = policies(bias=False)
    layer = next(module for module in ours.modules() if isinstance(module, FusedLora))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(100, 24))
    assert {tuple(tensor.shape) for tensor in kept} == {(100, 24), (100, 4), (40, 24), (4, 24), (40, 4)}
