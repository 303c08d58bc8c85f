"""Everything that changes the weights of a model, one function each."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from bitfast import BitModel
from bitfast.layers import WeightStandardizedConv2d


def convolutions(model: nn.Module) -> list[WeightStandardizedConv2d]:
    return [m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]


def features(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


@torch.no_grad()
def move_weights(model: nn.Module) -> None:
    """Replace the ones and zeros that GroupNorm starts with, which would hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.bias.copy_(0.2 * torch.randn_like(module.bias))


def edit_in_place(model: BitModel) -> None:
    with torch.no_grad():
        convolutions(model)[1].weight.mul_(torch.rand_like(convolutions(model)[1].weight))


def edit_in_inference_mode(model: BitModel) -> None:
    with torch.inference_mode():
        convolutions(model)[1].weight.add_(torch.randn_like(convolutions(model)[1].weight))


def edit_a_detached_alias(model: BitModel) -> None:
    convolutions(model)[2].weight.detach().normal_()


def step_an_optimizer(model: BitModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def step_a_foreach_optimizer(model: BitModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True).step()


def step_a_fused_optimizer(model: BitModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def other_state(model: BitModel) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def load_a_state_dict(model: BitModel) -> None:
    model.load_state_dict(other_state(model))


def load_by_assignment(model: BitModel) -> None:
    model.load_state_dict(other_state(model), assign=True)


def replace_a_parameter(model: BitModel) -> None:
    layer = convolutions(model)[0]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def swap_the_data(model: BitModel) -> None:
    layer = convolutions(model)[0]
    layer.weight.data = torch.randn_like(layer.weight)


def free_and_swap_the_data(model: BitModel) -> None:
    """The new numbers must not pass for the old ones because they come to lie at the same address."""
    weight = convolutions(model)[0].weight
    shape = weight.shape
    weight.data = torch.empty(0)
    gc.collect()
    weight.data = torch.randn(shape)


def edit_the_data_and_evaluate(model: BitModel) -> None:
    convolutions(model)[0].weight.data.normal_()  # which torch does not count
    model.eval()


def train_a_step(model: BitModel) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    features(model, torch.randn(2, 3, 33, 47)).square().sum().backward()
    optimizer.step()
    model.eval()


def tie_two_weights(model: BitModel) -> None:
    first, second = alike(model)
    second.weight = first.weight


def alike(model: BitModel) -> tuple[WeightStandardizedConv2d, WeightStandardizedConv2d]:
    """Two convolutions whose weights have one shape."""
    by_shape: dict[torch.Size, WeightStandardizedConv2d] = {}
    for layer in convolutions(model):
        if layer.weight.shape in by_shape:
            return by_shape[layer.weight.shape], layer
        by_shape[layer.weight.shape] = layer
    raise AssertionError("no two weights have one shape")


CHANGES = [
    edit_in_place,
    edit_in_inference_mode,
    edit_a_detached_alias,
    step_an_optimizer,
    step_a_foreach_optimizer,
    step_a_fused_optimizer,
    load_a_state_dict,
    load_by_assignment,
    replace_a_parameter,
    swap_the_data,
    free_and_swap_the_data,
    edit_the_data_and_evaluate,
    train_a_step,
    tie_two_weights,
]
