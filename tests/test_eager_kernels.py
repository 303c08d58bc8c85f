"""Eager calls of the Triton backend go past the dispatcher, and compute what its operators compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfast.backends import use_backend
from bitfast.ops import eager
from bitfast.ops import group_norm_act_eager as norms
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.weight_standardization import weight_standardization_all
from tests.eager_calls import (
    FORMS,
    GROUPS,
    LAYOUTS,
    Watched,
    added,
    alone_and_watched,
    assert_same,
    filters,
    flat,
    gradients_of,
    inputs,
    norm,
    shifted,
    triton,  # noqa: F401
)
from tests.interpreter import DEVICE
from tests.launch_ways import choose
from tests.threads import in_threads

# ---- the same numbers -----------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("way", ["whole", "split"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
def test_norms_and_their_gradients(name, layout, dtype, parameter_dtype, way, monkeypatch):
    choose(monkeypatch, way)
    tensors = inputs(layout, dtype, parameter_dtype)
    itself, watched, seen = alone_and_watched(FORMS[name], *tensors)
    assert_same(itself, watched)
    assert seen == [f"{name}.triton"]
    itself, watched, seen = alone_and_watched(gradients_of(FORMS[name]), *tensors)
    assert_same(itself, watched)
    assert seen == [f"{name}.triton", "group_norm_act_backward.triton"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard, name):
    tensors = [t.requires_grad_() for t in inputs()]
    with guard():
        itself, watched, _ = alone_and_watched(FORMS[name], *tensors)
        assert_same(itself, watched)
        assert not any(r.requires_grad for r in flat(itself))
        assert all(r.is_inference() == torch.is_inference_mode_enabled() for r in flat(itself))


ODD = {
    "sliced": lambda x: (
        torch.cat([x, x], dim=3)[..., ::2] if x.dim() == 4 else torch.stack([x, x], 1)[:, 0]
    ),
    "permuted": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3) if x.dim() == 4 else x,
    "other layout": lambda x: x.contiguous(),
    "misaligned": shifted,
    "negative": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", FORMS)
def test_odd_tensors(name, odd, place):
    tensors = inputs()
    tensors[place] = ODD[odd](tensors[place])
    itself, watched, _ = alone_and_watched(gradients_of(FORMS[name]), *tensors)
    assert_same(itself, watched)
    with torch.no_grad():
        itself, watched, _ = alone_and_watched(FORMS[name], *tensors)
    assert_same(itself, watched)


@pytest.mark.parametrize("shape", [(0, 8, 5, 3), (2, 8, 1, 1), (3, 4, 1, 7), (1, 8, 1, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
def test_odd_shapes(name, layout, shape):
    itself, watched, _ = alone_and_watched(gradients_of(FORMS[name]), *inputs(layout, shape=shape))
    assert_same(itself, watched)


@pytest.mark.parametrize("name", FORMS)
def test_autocast(name):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            itself, watched, _ = alone_and_watched(gradients_of(FORMS[name]), *inputs(dtype=dtype))
            assert_same(itself, watched)
            results = itself[: 2 if name == "add_group_norm_act" else 1]
            assert results[-1].dtype == torch.bfloat16
            assert results[0].dtype == (dtype if len(results) == 2 else torch.bfloat16)


@pytest.mark.parametrize("change", ["expanded", "other layout", "misaligned", "permuted"])
@pytest.mark.parametrize("name", FORMS)
def test_odd_gradients(name, change):
    tensors = inputs()

    def upstream(result: Tensor) -> Tensor:
        grad = torch.cos(result.detach())
        if change == "expanded":
            return grad[:1, :1, :1, :1].expand_as(grad)
        if change == "other layout":
            return grad.contiguous()
        return (
            shifted(grad)
            if change == "misaligned"
            else grad.transpose(2, 3).contiguous().transpose(2, 3)
        )

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        results = flat(FORMS[name](*leaves))
        found = torch.autograd.grad(
            results, leaves, [upstream(r) for r in results], allow_unused=True
        )
        return [g for g in found if g is not None]

    itself, watched, _ = alone_and_watched(run, *tensors)
    assert_same(itself, watched)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_two(used):
    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        result = added(*leaves)[used]
        found = torch.autograd.grad(result.sin().sum(), leaves, allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in found]

    itself, watched, _ = alone_and_watched(run, *inputs())
    assert_same(itself, watched)


# ---- higher derivatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives(name):
    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        loss = sum(r.sin().sum() for r in flat(FORMS[name](*leaves)))
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        again = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(again, leaves, allow_unused=True)
        return [g for g in (*first, *second) if g is not None]

    itself, watched, _ = alone_and_watched(run, *inputs())
    for a, b in zip(itself, watched, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_gradients_in_batches(name):
    leaves = [t.requires_grad_() for t in inputs()]
    results = flat(FORMS[name](*leaves))
    grads = [torch.randn(3, *r.shape, device=DEVICE) for r in results]
    batched = torch.autograd.grad(
        results, leaves, grads, is_grads_batched=True, allow_unused=True, retain_graph=True
    )
    for number in range(3):
        single = torch.autograd.grad(
            results, leaves, [g[number] for g in grads], allow_unused=True, retain_graph=True
        )
        for b, s in zip(batched, single, strict=True):
            if s is not None:
                torch.testing.assert_close(b[number], s, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_forward_mode_and_transforms_see_plain_pytorch(name):
    tensors = inputs()
    tangents = tuple(torch.randn_like(t) for t in tensors)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(t, d)
            for t, d in zip(tensors, tangents, strict=True)
        ]
        ours = [torch.autograd.forward_ad.unpack_dual(r).tangent for r in flat(FORMS[name](*duals))]
    with use_backend("reference"):
        _, expected = torch.func.jvp(
            lambda *t: tuple(flat(FORMS[name](*t))), tuple(tensors), tangents
        )
        stacked = torch.func.vmap(FORMS[name], in_dims=(0, 0, None, None))(
            *(t[:, None] for t in tensors[:2]), *tensors[2:]
        )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    itself = torch.func.vmap(FORMS[name], in_dims=(0, 0, None, None))(
        *(t[:, None] for t in tensors[:2]), *tensors[2:]
    )
    for a, b in zip(flat(itself), flat(stacked), strict=True):
        torch.testing.assert_close(a, b)


# ---- what is called -------------------------------------------------------------------------------


def nodes_of(result: Tensor) -> list[str]:
    """Return the names of the nodes of autograd's graph, without those of leaves."""
    names, waiting = [], [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or "AccumulateGrad" in node.name():
            continue
        names.append(node.name())
        waiting += [before for before, _ in node.next_functions]
    return names


def test_each_op_is_one_node():
    x, residual, weight, bias = (t.requires_grad_() for t in inputs())
    assert nodes_of(group_norm_act(x, weight, bias, GROUPS)) == ["GroupNormActBackward"]
    total, result = add_group_norm_act(x, residual, weight, bias, GROUPS)
    assert total.grad_fn is result.grad_fn
    assert nodes_of(result) == ["AddGroupNormActBackward"]
    results = weight_standardization_all([w.requires_grad_() for w in filters()])
    assert all(nodes_of(r) == ["StandardizeAllBackward"] for r in results)
    assert len({r.grad_fn for r in results}) == 1


def test_no_operator_is_dispatched():
    x, residual, weight, bias = (t.requires_grad_() for t in inputs())
    with torch.profiler.profile() as profile:
        result = group_norm_act(x, weight, bias, GROUPS)
        results = add_group_norm_act(result, residual, weight, bias, GROUPS)
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        with torch.no_grad():
            group_norm_act(x, weight, bias, GROUPS)
        weight_standardization_all(filters())
    names = {event.key for event in profile.key_averages()}
    assert not [name for name in names if name.startswith("bitfast::")]
    assert [name for name in names if name.startswith("aten::")]


def test_arguments_are_checked_once_for_each_kind():
    x, _, weight, bias = inputs()
    with pytest.raises(ValueError, match="num_groups must divide"):
        group_norm_act(x, weight, bias, 3)
    with pytest.raises(ValueError, match="weight must have shape"):
        group_norm_act(x, weight[:4], bias, 4)
    with pytest.raises(ValueError, match="residual must have the shape"):
        add_group_norm_act(x, x[:1], weight, bias, 4)
    with pytest.raises(ValueError, match="activation must be one of"):
        group_norm_act(x, weight, bias, 4, activation="tanh")
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got NoneType"):
        group_norm_act(x, weight, None, 4)
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got float"):
        add_group_norm_act(x, 1.0, weight, bias, 4)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        group_norm_act(x, weight.int(), bias, 4)
    with pytest.raises(TypeError, match="integer"):
        group_norm_act(x, weight, bias, 4.0)
    group_norm_act(x, weight, bias, 4)
    for _ in range(2):  # also where there is a call of the same shapes already
        with pytest.raises(ValueError, match="num_groups must divide"):
            group_norm_act(x, weight, bias, 3)
        with pytest.raises(ValueError, match="eps must be at least 0"):
            group_norm_act(x, weight, bias, 4, eps=-1.0)


def test_another_backend_is_another_kind_of_call():
    x, _, weight, bias = inputs()
    ours = group_norm_act(x, weight, bias, GROUPS)
    with use_backend("reference"), torch.profiler.profile() as profile:
        reference = group_norm_act(x, weight, bias, GROUPS)
    assert any(
        "rsqrt" in event.key or "var" in event.key or "mean" in event.key
        for event in profile.key_averages()
    )
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("place", range(4))
def test_subclasses_take_the_operator(place):
    tensors = inputs()
    expected = added(*tensors)
    tensors[place] = tensors[place].as_subclass(Watched)
    for a, b in zip(added(*tensors), expected, strict=True):
        assert torch.equal(a, b)
        assert type(a) is Watched


def test_no_kernel_is_launched_on_tensors_without_memory():
    meta = [t.to("meta") for t in inputs()]
    assert not eager.may_launch("group_norm_act", meta[0])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs()]
    assert not eager.may_launch("group_norm_act", fake[0])
    x, _, weight, bias = inputs()
    assert norms.launch(x, None, weight.to("meta"), bias, GROUPS, 1e-5, "relu") is None


def test_parameters_and_their_data_may_change():
    x, _, weight, bias = inputs()
    parameter = nn.Parameter(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        parameter.data = weight.to(dtype)
        itself, watched, _ = alone_and_watched(lambda: norm(x, x, parameter, bias))
        assert_same(itself, watched)


def test_saved_tensors_go_through_hooks():
    tensors = inputs()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor.contiguous())
        return len(kept) - 1

    def run(*tensors: Tensor) -> list[Tensor]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: kept[place].clone()):
            return gradients_of(norm)(*tensors)

    itself, watched, _ = alone_and_watched(run, *tensors)
    assert_same(itself, watched)
    assert kept


def test_checkpointing():
    x, _, weight, bias = (t.requires_grad_() for t in inputs())

    def run() -> list[Tensor]:
        result = torch.utils.checkpoint.checkpoint(norm, x, x, weight, bias, use_reentrant=False)
        return [result, *torch.autograd.grad(result.sin().sum(), (x, weight, bias))]

    itself, watched, _ = alone_and_watched(run)
    assert_same(itself, watched)


def test_another_thread_computes_the_same():
    tensors = inputs()
    expected = gradients_of(added)(*tensors)
    found: list[Tensor] = []

    def work(_: int) -> None:
        with use_backend("triton"):
            found.extend(gradients_of(added)(*tensors))

    in_threads(work, 1)
    assert_same(found, expected)


# ---- what is kept ---------------------------------------------------------------------------------


def test_no_more_is_kept_than_is_said():
    kept: eager.BoundedCache[int] = eager.BoundedCache(most=3)
    for number in range(10):
        assert kept.keep(number, number) == number
        assert len(kept) <= 3
    assert kept[9] == 9


def test_threads_may_share_what_is_kept():
    kept: eager.BoundedCache[int] = eager.BoundedCache(most=5)
    wrong: list[int] = []

    def work(_: int) -> None:
        for number in range(2000):
            found = kept.get(number % 11)
            if found is None:
                found = kept.keep(number % 11, number % 11)
            if found != number % 11:
                wrong.append(number)

    in_threads(work, 4)
    assert not wrong
    assert len(kept) <= 5 + 4
