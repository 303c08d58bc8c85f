"""What has no derivative says so; what needs none still runs without being asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from bitfast.ops.derivatives import FUNCTION_TRANSFORMS
from bitfast.ops.kept_weights import kept_weights
from bitfast.ops.norm_convolution import why_no_norm_convolution
from bitfast.ops.resize_normalize import resize_normalize
from tests.model_pairs import our_model
from tests.network_plans import plans_of
from tests.requirements import NEEDS_EXTENSION

OPERATORS = torch.ops.bitfast
WITHOUT_TENSORS = {
    "bitfast::instruction_set",
    "bitfast::norm_convolution_problem",
    "bitfast::pack_images.native",  # copies bytes
    "bitfast::packed_places.native",  # integers only, as the next two
    "bitfast::resize_filters.native",
    "bitfast::resize_plan.native",
}

pytestmark = NEEDS_EXTENSION


def test_every_operator_has_decided():
    """Each is either differentiable in all ways or refuses: both show in what function transforms meet."""
    undecided = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("bitfast::")
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, FUNCTION_TRANSFORMS)
    }
    assert undecided == WITHOUT_TENSORS


NORM = (torch.ones(4), torch.zeros(4), 2, 1e-5, "relu")
POINTWISE = nn.Parameter(torch.ones(4, 4, 1, 1), requires_grad=False)
FILTERS = torch.ones(4, 4, 1, 1)
STATISTICS = (torch.zeros(2, 2), torch.ones(2, 2))
GEOMETRY = ([1, 1], [0, 0], [1, 1])


OTHER = torch.ones(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)


def image() -> Tensor:
    return torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)


def _norm_into(x: Tensor) -> None:
    OPERATORS.group_norm_act_into.native(x, None, *NORM, None, torch.empty_like(OTHER))


def _norm_backward(backend: str, x: Tensor, name: str = "group_norm_act_backward") -> None:
    operator = getattr(getattr(OPERATORS, name), backend)
    operator(OTHER, None, x, *NORM[:2], *STATISTICS, 2, "relu")


_norm_recompute = partial(_norm_backward, name="group_norm_act_recompute")


def _weight_backward(backend: str, x: Tensor) -> None:
    operator = getattr(OPERATORS.weight_standardization_backward, backend)
    operator(x, x.detach(), torch.zeros(2), torch.ones(2))


def _weights_backward(backend: str, x: Tensor) -> None:
    operator = getattr(OPERATORS.weight_standardization_all_backward, backend)
    operator(torch.zeros(320), [x], torch.zeros(2), torch.ones(2), False)


def _pool_backward(backend: str, x: Tensor) -> None:
    operator = getattr(OPERATORS.same_max_pool_backward, backend)
    taps = torch.zeros(2, 4, 6, 6, dtype=torch.uint8)
    operator(x, taps, [11, 11], [1, 1], [2, 2], [1, 1], [0, 0, 0, 0])


@cache
def _filters() -> Tensor:
    return OPERATORS.pack_norm_convolution.native(FILTERS, False)


def _normalizing(x: Tensor) -> None:
    OPERATORS.norm_convolution.native(x, None, *NORM, _filters(), 4, 1, 1, False)


def _added_normalizing(x: Tensor) -> None:
    OPERATORS.norm_convolution_add_.native(OTHER, None, *NORM, _filters(), x, 1, 1, False)


def _weight_of_convolution(x: Tensor) -> None:
    result = torch.empty(4, 4, 1, 1)
    OPERATORS.convolution_weight_gradient.native(
        x, *(None,) * 4, 1, "none", OTHER, *GEOMETRY, False, result
    )


@cache
def _model() -> Any:
    model = our_model("BitModel", num_channels=4, hidden_sizes=[16], depths=[1])
    return model.eval().requires_grad_(False)


def _network(x: Tensor) -> None:
    parameters, name = list(_model().parameters()), _model().plans.name
    OPERATORS.network.planned(x, parameters, name, 1, [1], True, True, None, "")


def _block_backward(x: Tensor) -> None:
    form = "[[[null,[[[[1,1],[0,0],[1,1]],null]]]],null]"  # one convolution
    arguments = (None, [FILTERS], None, [], form, 1.0, True, [True])
    OPERATORS.residual_block_backward.native(OTHER, x, *arguments)


def _resize(backend: str, x: Tensor) -> None:
    operator = getattr(OPERATORS.resize_normalize, backend)
    operator([x[0]], [4, 4], [4, 4], [0, 0], 3, [], [], [], torch.float32, False, [1])


UNDERIVED: dict[str, Callable[[Tensor], None]] = {
    "norm in place": lambda x: OPERATORS.group_norm_act_.native(x, None, *NORM, None),
    "norm into memory": _norm_into,
    "packed": lambda x: OPERATORS.packed_convolution.native(x, POINTWISE, 1e-8, *GEOMETRY),
    "normalizing": _normalizing,
    "added normalizing": _added_normalizing,
    "a whole network": _network,
    "backward of a block": _block_backward,
    "a convolution's weight": _weight_of_convolution,
    "packing": lambda x: OPERATORS.pack_norm_convolution.native(x[..., :1, :1].contiguous(), False),
    "moments": lambda x: OPERATORS.channel_moments.native(x),
    "statistics": lambda x: OPERATORS.group_statistics.native(
        x[:, :, 0].double().contiguous(), 2, 1e-5
    ),
    **{
        f"{name} by {backend}": partial(run, backend)
        for name, run in {
            "backward of norms": _norm_backward,
            "backward of norms with the result": _norm_recompute,
            "backward of weights": _weight_backward,
            "backward of all weights": _weights_backward,
            "backward of pools": _pool_backward,
            "resize": _resize,
        }.items()
        for backend in ("reference", "native")
    },
}
ALSO_TRITON = {
    f"{name} by triton": partial(run, "triton")
    for name, run in {
        "backward of norms": _norm_backward,
        "backward of norms with the result": _norm_recompute,
        "backward of weights": _weight_backward,
        "backward of all weights": _weights_backward,
    }.items()
}


Run = Callable[[Tensor], None]


def _with_tangent(run: Run, x: Tensor) -> None:
    with forward_ad.dual_level(), torch.no_grad():
        run(forward_ad.make_dual(x, x.cos()))


MODES: dict[str, Callable[[Run, Tensor], object]] = {
    "gradient": lambda run, x: run(x.requires_grad_() * 1),
    "tangent": _with_tangent,
    "jvp": lambda run, x: jvp(run, (x,), (x,)),
    "grad": lambda run, x: grad(run)(x),
    "vmap": lambda run, x: vmap(run)(x[None]),
}


@pytest.mark.parametrize("name", [*UNDERIVED, *ALSO_TRITON])
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_what_has_none(name, mode):
    _filters(), _model()  # before anything is transformed
    run = {**UNDERIVED, **ALSO_TRITON}[name]
    with pytest.raises(NotImplementedError, match=r"bitfast\.[\w.]+ has no derivative"):
        MODES[mode](run, image())


@pytest.mark.parametrize("name", UNDERIVED)
def test_ops_without_derivatives_run_where_none_is_asked_for(name):
    if "normalizing" in name and (reason := why_no_norm_convolution(torch.float32)) is not None:
        pytest.skip(reason)
    with torch.no_grad():
        UNDERIVED[name](image().requires_grad_())
    UNDERIVED[name](image())  # records gradients, but of nothing


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_images_can_be_batched_by_vmap(dtype):
    images = (torch.rand(3, 9, 8, 3) * 255).to(dtype)
    resize = lambda x: resize_normalize([x], [(5, 6)], (4, 4), 3, 1 / 255, (0.1,) * 3, (0.4,) * 3)  # noqa: E731
    expected = torch.stack([resize(x) for x in images])
    torch.testing.assert_close(vmap(resize)(images), expected)


def test_forward_mode_of_images():
    image = torch.rand(9, 8, 3, dtype=torch.float64)
    direction = torch.rand(9, 8, 3, dtype=torch.float64)
    resize = lambda x: resize_normalize([x], [(5, 6)], (4, 4), 3, 2.0, dtype=torch.float64)  # noqa: E731
    expected = resize(image + direction) - resize(image)  # it is linear
    torch.testing.assert_close(jvp(resize, (image,), (direction,))[1], expected)
    with forward_ad.dual_level():
        result = resize(forward_ad.make_dual(image, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, expected)


def test_gradients_of_images_are_refused():
    with pytest.raises(ValueError, match="must not require a gradient"):
        grad(lambda x: resize_normalize([x], [(5, 6)]).sum())(torch.rand(9, 8, 3))


# ---- what is kept -------------------------------------------------------------------------------


def test_nothing_is_kept_of_a_transformed_pass():
    """What a transform computes ends with it."""
    model = our_model("BitModel", hidden_sizes=[16], depths=[1]).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        vmap(lambda image: model(image[None])[1])(x)
        jvp(lambda images: model(images)[1], (x,), (x,))
        assert plans_of(model) == []
        assert not any(id(parameter) in kept_weights._kept for parameter in model.parameters())
        expected = vmap(lambda image: model(image[None])[1])(x)[:, 0]
        torch.testing.assert_close(model(x)[1], expected, rtol=1e-4, atol=1e-5)
