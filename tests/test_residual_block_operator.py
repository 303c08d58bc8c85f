"""A residual block as one operator of compiled programs: compiled training, and the operator itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd import forward_ad

from bitfast.ops.block_links import Convolution, Link
from bitfast.ops.group_norm_act_gradients import NormSettings
from bitfast.ops.norm_convolution import uses_norm_convolution, why_no_norm_convolution
from bitfast.ops.residual_block import Form, Join
from bitfast.ops.residual_block_form import form_of, text_of
from tests.model_pairs import LAYER_TYPES, assert_as_exact, gradients, our_model, pair
from tests.tolerances import Triples, assert_draws_within_contract

OPERATOR = "bitfast.residual_block.native"
BACKWARD_OPERATOR = "bitfast.residual_block_backward.native"
BLOCKS = 2
ONE_STAGE = {"depths": [2], "hidden_sizes": [16]}
SAME = {"global_padding": "same", "embedding_dynamic_padding": True}

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fused() -> None:
    if not uses_norm_convolution("cpu", torch.float32):
        pytest.skip(f"blocks are not fused here: {why_no_norm_convolution(torch.float32)}")


# ---- compiled models ------------------------------------------------------------------------------


class Recorder:
    """Compiles a model in training, and counts what its forward and backward graphs call."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs = AotEagerAndRecordGraphs()
        self.model = torch.compile(model, fullgraph=True, backend=self.graphs)

    def calls(self) -> list[tuple[int, int]]:
        """Return how often each compiled program calls the operator, and its backward operator."""
        return [
            (_count(forward, OPERATOR), _count(backward, BACKWARD_OPERATOR))
            for forward, backward in zip(self.graphs.fw_graphs, self.graphs.bw_graphs, strict=True)
        ]


def _count(program: torch.fx.GraphModule, name: str) -> int:
    return sum(str(node.target) == name for node in program.graph.nodes)


def objective(images: Tensor, labels: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(images, labels).loss


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("layer_type", "settings"),
    [("preactivation", {}), ("bottleneck", {"hidden_act": "gelu", **SAME})],
    ids=["preactivation", "bottleneck, same, gelu"],
)
def test_gradients_of_one_program_for_all_sizes(layer_type, settings):
    settings = {"layer_type": layer_type, **ONE_STAGE, **settings}
    model, plain = pair("BitForImageClassification", **settings)
    exact = copy.deepcopy(plain).double()
    recorder = Recorder(model)
    for number, (batch, *size) in enumerate([(2, 33, 47), (3, 64, 50), (5, 40, 70)]):
        images, labels = torch.randn(batch, 3, *size), torch.randint(5, (batch,))
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            found = gradients(model, lambda _: recorder.model(images, labels).loss)  # noqa: B023
        expected = gradients(exact, objective(images.double(), labels))
        assert_as_exact(found, gradients(plain, objective(images, labels)), expected)
    assert recorder.calls() == [(BLOCKS, BLOCKS)] * 2


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_stochastic_depth_drops_what_it_drops_without_a_compiler(layer_type):
    settings = {"layer_type": layer_type, "drop_path_rate": 0.5, **ONE_STAGE}
    model = our_model("BitForImageClassification", **settings).train()
    images, labels = torch.randn(8, 3, 33, 47), torch.randint(5, (8,))
    recorder = Recorder(model)
    found = []
    for run in (recorder.model, model):
        torch.manual_seed(1)
        found.append(gradients(model, lambda _: run(images, labels).loss))  # noqa: B023
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch.manual_seed(2)
    other = gradients(model, lambda _: recorder.model(images, labels).loss)
    assert any(not torch.equal(other[name], gradient) for name, gradient in found[0].items())
    assert recorder.calls() == [(BLOCKS, BLOCKS)]


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_autocast_keeps_the_contract(layer_type):
    if not uses_norm_convolution("cpu", torch.bfloat16):
        pytest.skip(f"blocks are not fused here: {why_no_norm_convolution(torch.bfloat16)}")
    model, plain = pair("BitForImageClassification", layer_type=layer_type, **ONE_STAGE)
    exact = copy.deepcopy(plain).double()
    recorder = Recorder(model)

    def draw() -> Triples:
        images, labels = torch.randn(4, 3, 40, 40), torch.randint(5, (4,))
        with torch.autocast("cpu", torch.bfloat16):
            loss, plain_loss = recorder.model(images, labels).loss, plain(images, labels).loss
        found = gradients(model, lambda _: loss)
        expected = gradients(exact, objective(images.double(), labels))
        allowed = gradients(plain, lambda _: plain_loss)
        return {
            "gradients": tuple(
                torch.cat([each[name].flatten() for name in expected])
                for each in (found, allowed, expected)
            )  # type: ignore[dict-item]
        }

    assert_draws_within_contract(draw, 2)
    assert recorder.calls() == [(BLOCKS, BLOCKS)]


@pytest.mark.usefixtures("fused")
def test_frozen_parts_cost_no_backward_pass():
    model = our_model("BitForImageClassification", **ONE_STAGE)
    model.bit.embedder.requires_grad_(False)
    first, second = model.bit.encoder.stages[0].layers
    first.requires_grad_(False)
    second.conv2.requires_grad_(False)
    images, labels = torch.randn(2, 3, 33, 47), torch.randint(5, (2,))
    recorder = Recorder(model)
    found = gradients(model, lambda _: recorder.model(images, labels).loss)
    expected = gradients(model, objective(images, labels))
    assert list(found) == list(expected)
    assert_as_exact(found, expected, gradients(model.double(), objective(images.double(), labels)))
    assert recorder.calls() == [(BLOCKS, 1)]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_checkpoints_compute_blocks_again(layer_type):
    settings = {"layer_type": layer_type, "drop_path_rate": 0.5, **ONE_STAGE}
    model = our_model("BitForImageClassification", **settings).train()
    model.gradient_checkpointing_enable()
    images, labels = torch.randn(8, 3, 33, 47), torch.randint(5, (8,))
    recorder = Recorder(model)
    found = []
    for run in (recorder.model, model):
        torch.manual_seed(1)
        found.append(gradients(model, lambda _: run(images, labels).loss))  # noqa: B023
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert recorder.calls() == [(BLOCKS, BLOCKS)]
    (backward,) = recorder.graphs.bw_graphs
    assert _count(backward, OPERATOR) == BLOCKS


@pytest.mark.usefixtures("fused")
def test_inductor_takes_the_step_as_one_graph():
    model = our_model("BitForImageClassification", **ONE_STAGE)
    images, labels = torch.randn(2, 3, 33, 47), torch.randint(5, (2,))
    compiled = torch.compile(model, fullgraph=True)
    found = gradients(model, lambda _: compiled(images, labels).loss)
    expected = gradients(model, objective(images, labels))
    assert_as_exact(found, expected, gradients(model.double(), objective(images.double(), labels)))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.bit.encoder.stages[0].layers[0].register_forward_hook(lambda *_: None),
    ],
    ids=["float64", "a hook"],
)
@pytest.mark.usefixtures("fused")
def test_elsewhere_the_compiler_sees_the_parts(change):
    model = our_model("BitForImageClassification", **ONE_STAGE).train()
    change(model)
    recorder = Recorder(model)
    recorder.model(torch.randn(2, 3, 33, 47, dtype=model.dtype)).logits.sum().backward()
    (counts,) = recorder.calls()
    assert max(counts) < BLOCKS


# ---- the operator ---------------------------------------------------------------------------------

NORM = NormSettings(4, 1e-5, "relu")
POINTWISE = Convolution(((1, 1), (0, 0), (1, 1)))
SQUARE = Convolution(((1, 1), (1, 1), (1, 1)))
PADDED = Convolution(((2, 2), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1)))
HALVED = Convolution(((2, 2), (0, 0), (1, 1)))
FORMS = {
    "preactivation": Form(
        (Link(NORM, (POINTWISE,)), Link(NORM, (SQUARE,)), Link(NORM, (POINTWISE,)))
    ),
    "preactivation, shortcut": Form(
        (Link(NORM, (POINTWISE, HALVED)), Link(NORM, (PADDED,)), Link(NORM, (POINTWISE,)))
    ),
    "bottleneck": Form(
        (Link(None, (POINTWISE,)), Link(NORM, (SQUARE,)), Link(NORM, (POINTWISE,))),
        Join(NORM._replace(activation="none"), None, "relu"),
    ),
    "bottleneck, shortcut": Form(
        (Link(None, (POINTWISE, HALVED)), Link(NORM, (PADDED,)), Link(NORM, (POINTWISE,))),
        Join(NORM._replace(activation="none"), NORM._replace(activation="none"), "gelu"),
    ),
}  # fmt: skip


def parameters_of(form: Form, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Yield parameters of a block with 8 channels everywhere."""
    kernels = {POINTWISE: 1, HALVED: 1, SQUARE: 3, PADDED: 3}
    for link in form.links:
        yield from () if link.norm is None else (torch.rand(8), torch.randn(8))
        for convolution in link.convolutions:
            size = kernels[convolution]
            yield torch.randn(8, 8, size, size).to(dtype)
    if form.join is not None:
        for norm in (form.join.norm, form.join.shortcut_norm):
            yield from () if norm is None else (torch.rand(8), torch.randn(8))


def arguments(name: str, size: tuple[int, int], mask: Tensor | None = None) -> tuple[Any, ...]:
    x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last)
    parameters = [p.requires_grad_() for p in parameters_of(FORMS[name])]
    keep = 1.0 if mask is None else 0.5
    return x.requires_grad_(), None, mask, parameters, text_of(FORMS[name]), keep, True


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", FORMS)
def test_opcheck(name):
    # A map of 1x1 pixels has more than one order of strides.
    for size, mask in (((5, 6), None), ((1, 2), torch.ones(2, 1, 1, 1))):
        operator = torch.ops.bitfast.residual_block.native
        given = arguments(name, size, mask)
        torch.library.opcheck(operator, given)
        x, _, mask, parameters, form, keep, _ = given
        with torch.no_grad():
            result, _, *kept = operator(*given)
            backward = torch.ops.bitfast.residual_block_backward.native
            wanted = [number % 2 == 0 for number in range(len(parameters))]
            of_join = FORMS[name].join
            saved = result if of_join is not None and of_join.activation == "relu" else None
            detached = [p.detach() for p in parameters]
            given = x.detach(), mask, detached, saved, kept, form, keep, True, wanted
            torch.library.opcheck(backward, (torch.randn_like(result), *given))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", FORMS)
def test_without_a_backward_pass_nothing_is_kept(name):
    *given, _ = arguments(name, (5, 6))
    with torch.no_grad():
        kept = torch.ops.bitfast.residual_block.native(*given, True)
        found = torch.ops.bitfast.residual_block.native(*given, False)
    assert len(found) == 2
    assert len(kept) > 2
    torch.testing.assert_close(found[0], kept[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fused")
def test_other_derivatives_are_refused():
    x, *others = arguments("preactivation", (5, 6))
    operator = torch.ops.bitfast.residual_block.native
    result = operator(x, *others)[0].sum()
    with pytest.raises(NotImplementedError, match="residual_block_backward"):
        torch.autograd.grad(result, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="residual_block"):
        torch.func.grad(lambda x: operator(x, *others)[0].sum())(x.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="residual_block"):
        operator(forward_ad.make_dual(x.detach(), x.detach()), *others)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_can_be_read_again(name):
    form = FORMS[name]
    odd = form._replace(
        links=(form.links[0]._replace(norm=NormSettings(3, 1.1e-05, "gelu")), *form.links[1:])
    )
    for each in (form, odd):
        assert form_of(text_of(each)) == each
    assert form_of(text_of(form)) is form_of(text_of(form))


GOOD = text_of(FORMS["preactivation"])


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "[[],null]", "[1,2]", "{}", f"{GOOD} ", GOOD.replace("relu", "tanh"),
        GOOD.replace("[4,", "[4.0,"), GOOD.replace("[4,", "[true,"), GOOD.replace("1e-05", '"1"'),
        GOOD.replace("[1,1]", "[1]"), GOOD.replace("null]]]", "null],1]]"), GOOD[:-1] + ",null]",
    ],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="residual_block: form must be the text of a Form"):
        form_of(text)
