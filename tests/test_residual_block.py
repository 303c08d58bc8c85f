"""A residual block as one op: its results and its derivatives of every kind are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from bitfast.ops.residual_block import residual_block
from tests.model_pairs import assert_close
from tests.residual_blocks import BlockCase, Inputs, block_cases, computed, plain, whole
from tests.tolerances import Triples, assert_draws_within_contract

BLOCK = BlockCase(
    is_preactivation=True,
    batch=2,
    groups=2,
    channels=(3, 2, 4),
    size=(7, 6),
    stride=2,
    has_shortcut=True,
    is_same=False,
    adds=True,
    sums=False,
    drops=True,
    activation="gelu",
    dtype=torch.float64,
    layout=torch.channels_last,
    seed=1,
)
KINDS = {
    "preactivation": BLOCK,
    "preactivation, plain shortcut": replace(BLOCK, has_shortcut=False, drops=False),
    "preactivation, summed": replace(BLOCK, adds=False, sums=True, stride=1),
    "preactivation, same": replace(BLOCK, is_same=True, sums=True, drops=False),
    "bottleneck": replace(BLOCK, is_preactivation=False),
    "bottleneck, plain shortcut": replace(
        BLOCK, is_preactivation=False, has_shortcut=False, drops=False
    ),
    "bottleneck, same": replace(BLOCK, is_preactivation=False, is_same=True, stride=1),
}
KINDS = {name: whole(case) for name, case in KINDS.items()}
BOUND = 1e-10


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> BlockCase:
    return KINDS[request.param]


def ramps(outputs: list[Tensor]) -> list[Tensor]:
    """Return a gradient for each output."""
    return [
        torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).to(x.dtype).view(x.shape)
        for x in outputs
    ]


def gradients(outputs: list[Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, ramps(outputs), **options))


# ---- first derivatives ----------------------------------------------------------------------------


@settings(max_examples=80)
@given(case=block_cases([torch.float64], trained=st.integers(0, 2**20) | st.just(-1)))
def test_float64(case):
    """Of whatever needs a gradient; what does not, gets none."""
    ours = Inputs.of(case)
    exact = ours.to(torch.float64)
    actual, expected = computed(case, ours), plain(case, exact)
    assert_close(actual, expected)
    trained = ours.trained()
    assert any(x.requires_grad for x in actual) == bool(trained)
    if not trained:
        return
    wanted = gradients(expected, exact.leaves())  # of all: see Inputs.to
    found = gradients(actual, trained, retain_graph=True, allow_unused=True)
    again = gradients(actual, trained, allow_unused=True)
    wanted = [w for w, leaf in zip(wanted, ours.leaves(), strict=True) if leaf.requires_grad]
    for f, a, w in zip(found, again, wanted, strict=True):
        assert f is not None
        assert torch.equal(f, a)
        assert (f - w).norm() <= 1e-9 * max(w.norm(), 1)


def triples(case: BlockCase) -> Triples:
    """Return outputs and gradients."""
    ours = Inputs.of(case)
    results = []
    for compute, inputs in (
        (computed, ours),
        (plain, ours.to(case.dtype)),
        (plain, ours.to(torch.float64)),
    ):
        outputs = compute(case, inputs)
        results.append(
            [*(x.detach() for x in outputs), *gradients(outputs, inputs.leaves())],
        )
    return {str(number): each for number, each in enumerate(zip(*results, strict=True))}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract(case, dtype, layout, seed):
    seeds = iter(range(seed, seed + 1000))
    case = replace(case, dtype=dtype, layout=layout, size=(9, 10), channels=(4, 3, 4))
    assert_draws_within_contract(lambda: triples(replace(case, seed=next(seeds))), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts(case, dtype):
    """Results have the layout of the input, and gradients may come in any."""
    for layout in (torch.contiguous_format, torch.channels_last):
        of_dtype = replace(case, dtype=dtype, layout=layout)
        inputs = Inputs.of(of_dtype)
        outputs = computed(of_dtype, inputs)
        assert all(x.is_contiguous(memory_format=layout) for x in outputs)
        given_ = [torch.randn_like(x) for x in outputs]
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda g: g,
            lambda g: g.contiguous(),
            lambda g: g.contiguous(memory_format=torch.channels_last),
            lambda g: g.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
            lambda g: torch.stack([g, g], -1)[..., 1],
        ]
        expected, *others = (
            torch.autograd.grad(outputs, inputs.leaves(), list(map(way, given_)), retain_graph=True)
            for way in ways
        )
        for actual in others:
            assert all(map(torch.equal, actual, expected))
        ones = [torch.ones(()).to(dtype).expand(x.shape) for x in outputs]
        expanded, dense = (
            torch.autograd.grad(outputs, inputs.leaves(), grads, retain_graph=True)
            for grads in (ones, [x.contiguous() for x in ones])
        )
        assert all(map(torch.equal, expanded, dense))


def test_an_output_may_be_unused(case):
    case = replace(case, sums=False)
    if not case.is_preactivation:
        pytest.skip("this form has one output, so that none can be left out")
    ours = Inputs.of(case)
    exact = ours.to(torch.float64)
    for number in range(2):
        actual, expected = (
            torch.autograd.grad(outputs[number].square().sum(), inputs.leaves(), allow_unused=True)
            for outputs, inputs in (
                (computed(case, ours), ours),
                (plain(case, exact), exact),
            )
        )
        for a, e in zip(actual, expected, strict=True):
            if a is not None or e is not None:
                zero = torch.zeros(())
                assert ((zero if a is None else a) - (zero if e is None else e)).norm() < 1e-9


# ---- other derivatives ------------------------------------------------------------------------------


def second(case: BlockCase, compute: Any, inputs: Inputs) -> list[Tensor]:
    """Return first derivatives, products with the Hessian, and products with the third derivatives."""
    leaves = inputs.leaves()
    outputs = compute(case, inputs)
    first = gradients([x.square() for x in outputs], leaves, create_graph=True)
    directions = [leaf.detach().cos() for leaf in leaves]
    products = torch.autograd.grad(first, leaves, directions, create_graph=True)
    third = torch.autograd.grad(products, leaves, directions)
    return [*first, *products, *third]


def test_second_and_third_derivatives(case):
    ours = Inputs.of(case)
    exact = ours.to(torch.float64)
    assert_close(second(case, computed, ours), second(case, plain, exact), 1e-9)


def in_batches(case: BlockCase, compute: Any, inputs: Inputs) -> list[Tensor]:
    outputs = compute(case, inputs)
    grads = [torch.stack([g, g.flip(0), g.cos()]) for g in ramps(outputs)]
    return list(torch.autograd.grad(outputs, inputs.leaves(), grads, is_grads_batched=True))


def in_forward_mode(case: BlockCase, compute: Any, inputs: Inputs) -> list[Tensor]:
    """Of inputs of which none needs a gradient."""
    with forward_ad.dual_level():

        def dual(x: Tensor) -> Tensor:
            return forward_ad.make_dual(x.detach(), x.detach().cos())

        residual = None if inputs.residual is None else dual(inputs.residual)
        duals = Inputs(dual(inputs.x), residual, inputs.mask, list(map(dual, inputs.parameters)))
        return [forward_ad.unpack_dual(x).tangent for x in compute(case, duals)]  # type: ignore[misc]


def per_image(case: BlockCase, compute: Any, inputs: Inputs) -> list[Tensor]:
    """Gradients of the parameters for each image by itself."""
    case = replace(case, drops=False, layout=torch.contiguous_format)  # vmap knows only that

    def objective(parameters: list[Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
        given_ = Inputs(x[None], None if residual is None else residual[None], None, parameters)
        return sum(y.square().sum() for y in compute(case, given_))  # type: ignore[return-value]

    taken = torch.func.vmap(
        torch.func.grad(objective), in_dims=(None, 0, None if inputs.residual is None else 0)
    )
    parameters = [p.detach() for p in inputs.parameters]
    residual = None if inputs.residual is None else inputs.residual.detach()
    return taken(parameters, inputs.x.detach(), residual)


@pytest.mark.parametrize("way", [in_batches, in_forward_mode, per_image])
def test_other_ways_to_differentiate(case, way):
    ours = Inputs.of(case)
    exact = ours.to(torch.float64)
    assert_close(way(case, computed, ours), way(case, plain, exact), BOUND)


def test_tangents_of_a_gradient(case):
    """The gradient is linear in what it is given: its tangent is the gradient of the tangent."""
    inputs = Inputs.of(case)
    outputs = computed(case, inputs)
    grads, tangents = ramps(outputs), [g.cos() for g in ramps(outputs)]
    expected = torch.autograd.grad(outputs, inputs.leaves(), tangents, retain_graph=True)
    with forward_ad.dual_level():
        duals = list(map(forward_ad.make_dual, grads, tangents))
        found = torch.autograd.grad(outputs, inputs.leaves(), duals)
        actual = [forward_ad.unpack_dual(g).tangent for g in found]
    assert_close(actual, expected, BOUND)


# ---- what is kept, and what is not computed -------------------------------------------------------------


def test_no_normalized_activation_is_kept(case):
    """Of feature maps, what each norm reads; with an activation at the end also the result or what it reads."""
    for activation in ("relu", "gelu"):
        of_activation = replace(case, activation=activation)
        inputs = Inputs.of(of_activation)
        parameters = {p.data_ptr() for p in inputs.parameters}
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor, kept=kept, parameters=parameters) -> Tensor:
            if x.data_ptr() not in parameters:
                kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = computed(of_activation, inputs)
        sizes = sorted(x.numel() for x in kept.values() if x.dim() == 4 and x.numel() > case.batch)
        _, mid, out = (n * case.groups for n in case.channels)
        pixels = case.size[0] * case.size[1]
        after = outputs[0][0, 0].numel()
        expected = [inputs.x[0].numel(), mid * pixels, mid * after]
        if not case.is_preactivation:
            expected += [out * after] * (3 if case.has_shortcut else 2)
        assert sizes == sorted(case.batch * size for size in expected)
        statistics = [x for x in kept.values() if x.dim() == 2]
        assert all(x.shape == (case.batch, case.groups) for x in statistics)


def test_nothing_is_kept_where_nothing_is_trained(case):
    inputs = Inputs.of(replace(case, trained=0))

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("something is kept")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x):
        outputs = computed(case, inputs)
    assert not any(x.requires_grad for x in outputs)


def test_only_what_is_asked_for_is_computed(case):
    """As many FLOPs as autograd spends on plain PyTorch, whichever one tensor is trained."""
    ours = Inputs.of(case)
    exact = ours.to(torch.float64)
    for number in range(len(ours.leaves())):
        flops = []
        for inputs, compute in ((ours, computed), (exact, plain)):
            for place, leaf in enumerate(inputs.leaves()):
                leaf.requires_grad_(place == number)
            outputs = [x for x in compute(case, inputs) if x.requires_grad]
            objective = sum(x.sum() for x in outputs)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(objective, inputs.leaves()[number])  # type: ignore[arg-type]
            flops.append(counter.get_total_flops())
        assert flops[0] <= flops[1], number


# ---- changes in between -----------------------------------------------------------------------------------


def test_what_changes_before_the_backward_pass_is_noticed(case):
    count = len(Inputs.of(case).leaves())
    for number in range(count):
        inputs = Inputs.of(case)
        leaves = inputs.leaves()
        outputs = computed(case, inputs)
        with torch.no_grad():
            leaves[number].mul_(2)
        is_read = leaves[number] is not inputs.residual and (
            inputs.residual is None or leaves[number] is not inputs.x
        )
        if is_read:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(outputs, leaves)
        else:  # the sum is kept
            gradients(outputs, leaves)


def test_inference_gives_the_same_bits(case):
    for dtype in (torch.float32, torch.float64):
        of_dtype = replace(case, dtype=dtype)
        inputs = Inputs.of(of_dtype)
        expected = computed(of_dtype, inputs)
        before = [leaf.detach().clone() for leaf in inputs.leaves()]
        with torch.no_grad():
            actual = computed(of_dtype, inputs)
        assert all(map(torch.equal, actual, expected))
        assert all(map(torch.equal, inputs.leaves(), before))


def test_moments_of_the_input_may_be_given():
    """They spare a pass over the input, and change no number."""
    case = whole(replace(BLOCK, adds=False, drops=False, sums=True, dtype=torch.float32))
    first = Inputs.of(case)
    made = residual_block(case.form, first.x, None, None, None, first.parameters, sums=True)
    if made.moments is None:
        pytest.skip("only kernels for AVX-512 compute moments, and this CPU or build lacks them")
    following = whole(replace(case, channels=(4, 2, 3), size=tuple(made.branch.shape[2:])))
    second_ = Inputs.of(following)
    x = made.branch.detach().requires_grad_()
    results = []
    for moments in (None, made.moments):
        outputs = computed(following, replace(second_, x=x), moments)
        results.append([*outputs, *gradients(outputs, [x, *second_.parameters])])
    assert_close(*results, 1e-6)
