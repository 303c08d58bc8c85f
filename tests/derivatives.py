"""Derivatives of a function in every way that torch can take them, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import Module

Scalar = Callable[[Module, Tensor], Tensor]
"""Maps a model and images to one number."""


def orders(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor
) -> dict[str, Tensor]:
    """Return the first and second derivatives of sum(weights * function(...)^2) / 2, by their names.

    The second ones are those of a sum over all first ones, multiplied with the numbers of the inputs in reverse
    order: exactly the same ones for every implementation and dtype. (Numbers made of the first derivatives
    would carry their errors, nine times as large as those of the second ones.)
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    first = torch.autograd.grad(result, leaves, weights * result, create_graph=True)
    directions = [x.flip(tuple(range(x.dim()))) for x in inputs]
    second = torch.autograd.grad(first, leaves, directions)
    return {f"first {n}": g.detach() for n, g in enumerate(first)} | {
        f"second {n}": g for n, g in enumerate(second)
    }


# ---- of a model ---------------------------------------------------------------------------------


def features(model: Module, images: Tensor) -> list[Tensor]:
    """Return every tensor that the model returns for all images."""
    outputs = model(images)
    names = ("logits", "last_hidden_state", "pooler_output", "feature_maps")
    values = [getattr(outputs, name, None) for name in names]
    return [
        tensor
        for value in values
        if value is not None
        for tensor in (value if isinstance(value, tuple) else (value,))
    ]


def objective(model: Module, images: Tensor) -> Tensor:
    """Return one number that depends on every feature the model returns."""
    total = images.new_zeros(())
    for tensor in features(model, images):
        ramp = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        total = total + (ramp * tensor.square()).mean()
    return total


def r1_penalty(model: Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of |d objective / d images|^2 for the images and each parameter that has one."""
    leaf = images.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(objective(model, leaf), leaf, create_graph=True)
    return [first.detach(), *_gradients(first.square().sum(), [leaf, *model.parameters()])]


def gradient_penalty(model: Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of |d objective / d parameters|^2 for each parameter that has one."""
    parameters = list(model.parameters())
    first = torch.autograd.grad(
        objective(model, images), parameters, create_graph=True, allow_unused=True
    )
    penalty = sum(g.square().sum() for g in first if g is not None)
    assert isinstance(penalty, Tensor)
    return _gradients(penalty, parameters)


def third_order(model: Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of a Hessian-vector product for the images and the first parameter."""
    leaf = images.detach().clone().requires_grad_()
    direction = images.cos()
    (first,) = torch.autograd.grad(objective(model, leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf, create_graph=True)
    return _gradients((second * direction).sum(), [leaf, next(model.parameters())])


def _gradients(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(value, of, allow_unused=True)
    assert gradients[0] is not None
    return [g for g in gradients if g is not None]


def per_sample_gradients(model: Module, images: Tensor) -> list[Tensor]:
    """Return the gradient of each parameter for each image by itself."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        call = lambda batch: functional_call(model, parameters, (batch,))  # noqa: E731
        return objective(call, image[None])  # type: ignore[arg-type]

    return list(vmap(grad(of_one), in_dims=(None, 0))(parameters, images).values())


def along_parameters(model: Module, images: Tensor) -> Tensor:
    """Return the derivative of the objective as all parameters grow."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        call = lambda batch: functional_call(model, parameters, (batch,))  # noqa: E731
        return objective(call, images)  # type: ignore[arg-type]

    return jvp(of_parameters, (parameters,), (parameters,))[1]


def in_forward_mode(model: Module, images: Tensor) -> Tensor:
    """Return the derivative of the objective along the cosine of the images, by dual numbers."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, images.cos())
        tangent = forward_ad.unpack_dual(objective(model, dual)).tangent
    assert tangent is not None
    return tangent


def in_batches(model: Module, images: Tensor) -> list[Tensor]:
    """Return two gradients of each kind at once."""
    leaf = images.detach().clone().requires_grad_()
    outputs = torch.stack([objective(model, leaf), objective(model, 0.5 * leaf)])
    inputs = [leaf, *model.parameters()]
    gradients = torch.autograd.grad(
        outputs, inputs, torch.eye(2, dtype=images.dtype), is_grads_batched=True, allow_unused=True
    )
    return [g for g in gradients if g is not None]


def _of_images(model: Module) -> Callable[[Tensor], Tensor]:
    return lambda images: objective(model, images)


REVERSE = {
    "R1 penalty": r1_penalty,
    "gradient penalty": gradient_penalty,
    "third order": third_order,
    "gradients in batches": in_batches,
    "autograd.functional.hvp": lambda m, x: torch.autograd.functional.hvp(
        _of_images(m), x, x.cos()
    ),
    "autograd.functional.vhp": lambda m, x: torch.autograd.functional.vhp(
        _of_images(m), x, x.cos()
    ),
    "autograd.functional.jvp": lambda m, x: torch.autograd.functional.jvp(
        _of_images(m), x, x.cos()
    ),
}
"""What takes derivatives by torch.autograd, from a model and images."""

FORWARD = {
    "jvp": lambda m, x: jvp(_of_images(m), (x,), (x.cos(),)),
    "jvp of features": lambda m, x: jvp(lambda i: features(m, i), (x,), (x.cos(),)),
    "dual numbers": in_forward_mode,
    "jvp of parameters": along_parameters,
    "forward over reverse": lambda m, x: jvp(grad(_of_images(m)), (x,), (x.cos(),)),
}
"""What takes derivatives in forward mode."""

TRANSFORMS = {
    "grad": lambda m, x: grad(_of_images(m))(x),
    "vjp": lambda m, x: vjp(lambda i: m(i)[0], x)[1](torch.ones_like(m(x)[0]))[0],
    "vmap": lambda m, x: vmap(lambda image: objective(m, image[None]))(x),
    "vmap over vmap": lambda m, x: vmap(vmap(lambda i: objective(m, i[None])))(x[None]),
    "per-sample gradients": per_sample_gradients,
    "reverse over forward": lambda m, x: grad(lambda i: jvp(_of_images(m), (i,), (x.cos(),))[1])(x),
}
"""What transforms functions."""

DENSE = {
    "jacrev": lambda m, x: jacrev(lambda i: m(i)[0])(x),
    "jacfwd": lambda m, x: jacfwd(lambda i: m(i)[0])(x),
    "hessian": lambda m, x: hessian(_of_images(m))(x),
    "autograd.functional.hessian": lambda m, x: torch.autograd.functional.hessian(_of_images(m), x),
}
"""What takes whole matrices of derivatives: of few pixels."""
