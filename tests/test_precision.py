"""Mixed precision: every mode computes in what bench/PRECISION.md says, and as exactly as it can."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import precision
from bench.precision import MODES, Mode, far_from_zero, look_trained, tiny
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.weight_standardization import weight_standardization
from tests.model_pairs import (
    CLASSES,
    DPT_HYBRID,
    LAYER_TYPES,
    flatten,
    our_model,
    pair,
)
from tests.tolerances import assert_draws_within_contract, relative_error

ON_CPU = [mode for mode in MODES if not mode.why_not("cpu")]
EVERY_MODE = pytest.mark.parametrize("mode", ON_CPU, ids=lambda mode: mode.name)
SHALLOW = {"depths": [1, 2], "hidden_sizes": [16, 32]}
DRAWS = 3


def converted(model: nn.Module, mode: Mode) -> Any:
    return model.to(mode.dtype).eval()


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(images, output_hidden_states=True))


# ---- what computes in what ----------------------------------------------------------------------


class Observed(TorchDispatchMode):
    """Collects the dtypes that each part of a network computes in, from the operators that torch is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        look = LOOKS.get(function._schema.name.partition("::")[2])
        if look is not None:
            for part, tensors in look(list(args), result).items():
                self.dtypes[part] |= {t.dtype for t in tensors if t is not None and t.numel()}
        return result


Look = Callable[[list[Any], Any], dict[str, list[Tensor]]]
"""Takes the arguments and the result of an operator; returns the tensors that show what parts compute in."""

LOOKS: dict[str, Look] = {
    # The statistics show what it was computed in.
    "weight_standardization": lambda _, result: {"standardization": result[1:]},
    "weight_standardization_all": lambda _, result: {"standardization": result[1:]},
    "var_mean": lambda _, result: {"standardization": result},
    "convolution": lambda args, result: {"convolution": [*args[:2], result]},
    "_convolution_pointwise": lambda args, result: {"convolution": [*args[:2], result]},
    "_convolution_pointwise_": lambda args, _: {
        "convolution": args[1:3],
        "residual": args[:2],
    },
    "norm_convolution": lambda args, result: {
        "convolution": [args[0], args[7], result[0]],
        "statistics": [args[1], result[1]],
    },
    "norm_convolution_add_": lambda args, result: {
        "convolution": [args[0], args[7]],
        "statistics": [args[1], result],
        "residual": [args[8]],
    },
    "group_norm_act": lambda _, result: {"statistics": result[1:]},
    "group_norm_act_": lambda args, _: {"statistics": [args[1]], "residual": [args[7]]},
    "group_norm_act_into": lambda args, _: {"statistics": [args[1]], "residual": [args[7]]},
    "add_group_norm_act": lambda args, result: {
        "statistics": result[2:],
        "residual": [*args[:2], result[0]],
    },
    "add": lambda args, result: {"residual": [*args[:2], result] if result.dim() == 4 else []},
    "same_max_pool": lambda args, result: {"pooling": [args[0], result[0]]},
    "max_pool2d_with_indices": lambda args, result: {"pooling": [args[0], result[0]]},
    "mean": lambda args, result: {"pooling": [args[0], result]},
    "addmm": lambda args, result: {"classifier": [*args[:3], result]},
}


def observed(model: nn.Module, images: Tensor, mode: Mode) -> dict[str, set[torch.dtype]]:
    with mode.entered("cpu"), Observed() as seen:
        logits = model(images).logits
    seen.dtypes["output"].add(logits.dtype)
    return dict(seen.dtypes)


@EVERY_MODE
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
def test_every_part_computes_in_what_the_table_says(learns, layer_type, mode):
    model = converted(
        our_model("BitForImageClassification", layer_type=layer_type, **SHALLOW), mode
    )
    model.train(learns)
    images = torch.randn(2, 3, 33, 47).to(mode.dtype)
    with nullcontext() if learns else torch.no_grad():
        seen = observed(model, images, mode)
    for part, expected in mode.parts.items():
        if part != "statistics":
            assert seen[part] == {getattr(torch, expected)}, part
    # In C++ the moments of whole feature maps are float64. Where plain PyTorch serves, it rounds the statistics
    # that it returns, not those that it computes with: the next tests are about these.
    assert seen.get("statistics", set()) <= {torch.float32, torch.float64}


def rounded_once(exact: Tensor, mode: Mode) -> float:
    """Return the error that rounding alone makes."""
    return relative_error(exact.to(mode.result), exact)


@EVERY_MODE
@pytest.mark.parametrize("change", [far_from_zero, tiny])
def test_standardization_is_rounded_once(change, mode):
    filters = torch.randn(48, 24, 3, 3)
    change(filters)
    filters = filters.to(mode.dtype)
    exact = weight_standardization(filters.double())
    with mode.entered("cpu"):
        actual = weight_standardization(filters)
    assert actual.dtype == mode.result
    assert relative_error(actual, exact) <= 2 * rounded_once(exact, mode)


@EVERY_MODE
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_are_rounded_once(layout, mode):
    # Statistics in float16 would overflow: of the squares, and of what is far from zero.
    x = (400 + torch.tensor([1.0, 4.0]).view(2, 1, 1, 1) * torch.randn(2, 24, 13, 9)).to(
        mode.result
    )
    x = x.contiguous(memory_format=layout)
    # Parameters that the result's dtype has, too.
    weight, bias = (torch.randn(24).to(mode.result).to(mode.dtype) for _ in range(2))
    exact = group_norm_act(x.double(), weight.double(), bias.double(), 4)
    with mode.entered("cpu"):
        actual = group_norm_act(x, weight, bias, 4)
    assert actual.dtype == mode.result
    # Where float32 computes, what rounding does to 400 takes the place of the result's own.
    far = 400 * torch.finfo(torch.float32).eps
    assert relative_error(actual, exact) <= 2 * rounded_once(exact, mode) + far


@EVERY_MODE
def test_residuals_are_rounded_once(mode):
    x, residual = (torch.randn(2, 24, 13, 9).to(mode.result) for _ in range(2))
    weight, bias = (torch.randn(24).to(mode.dtype) for _ in range(2))
    with mode.entered("cpu"):
        total, result = add_group_norm_act(x, residual, weight, bias, 4)
    assert total.dtype == result.dtype == mode.result
    exact = x.double() + residual.double()
    assert torch.equal(total, exact.to(mode.result))


def test_modes_for_a_gpu_give_no_figure_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tf32,) = (mode for mode in MODES if mode.has_tf32)
    row = precision.measured("R50x1, preactivation", tf32, "cpu")
    assert (row["ours"], row["transformers"]) == (None, None)
    assert "needs a GPU" in precision.errors_table([row])


# ---- errors -------------------------------------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_within_the_contract(name, layer_type, mode):
    def draw():
        ours, theirs = pair(name, layer_type=layer_type, **SHALLOW)
        look_trained(theirs)
        ours.load_state_dict(theirs.state_dict())
        ours, theirs = converted(ours, mode), converted(theirs, mode)
        images = torch.randn(6, 3, 64, 50).to(mode.dtype)
        with mode.entered("cpu"):
            actual, plain = outputs(ours, images), outputs(theirs, images)
        assert {tensor.dtype for tensor in actual} == {mode.result}
        exact = outputs(theirs.double(), images.double())
        # Under autocast transformers may leave float32. Ours are judged as if they were that, too.
        actual = [a.to(p.dtype) for a, p in zip(actual, plain, strict=True)]
        return {f"output {n}": t for n, t in enumerate(zip(actual, plain, exact, strict=True))}

    assert_draws_within_contract(draw, DRAWS)


def hybrid_errors(change: Callable[[Tensor], Any]) -> list[float]:
    """Return the float16 errors of DPT-hybrid backbones of bitfast and of transformers: root mean squares.

    Args:
        change: Made to all filters before they are rounded to float16.
    """
    squares = []
    for _ in range(DRAWS):
        ours, theirs = pair("BitBackbone", **DPT_HYBRID)
        with torch.no_grad():
            for module in theirs.modules():
                if isinstance(module, nn.Conv2d):
                    change(module.weight)
        ours.load_state_dict(theirs.state_dict())
        ours, theirs = ours.half().eval(), theirs.half().eval()
        images = torch.randn(2, 3, 64, 64).half()
        actual, plain = outputs(ours, images), outputs(theirs, images)
        assert all(torch.isfinite(tensor).all() for tensor in actual)
        assert {tensor.dtype for tensor in actual} == {torch.float16}
        exact = outputs(theirs.double(), images.double())
        errors = [[relative_error(*p) for p in zip(r, exact, strict=True)] for r in (actual, plain)]
        squares.append(torch.tensor(errors).square().mean(1))
    return torch.stack(squares).mean(0).sqrt().tolist()


@pytest.mark.parametrize(("change", "factor"), [(far_from_zero, 8), (tiny, 2)])
def test_a_dpt_hybrid_in_float16_bears_what_half_precision_cannot_standardize(change, factor):
    _, ordinary = hybrid_errors(lambda _: None)
    ours, theirs = hybrid_errors(change)
    print(
        f"{change.__name__}: bitfast {ours:.1e}, transformers {theirs:.1e}, which on ordinary filters has"
        f" {ordinary:.1e}"
    )
    # As exact as transformers is on filters that half precision can standardize.
    assert ours <= 2 * ordinary + torch.finfo(torch.float16).eps / 2
    assert theirs > factor * ours


# ---- the page -----------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHALLOW, "embedding_size": 8, "num_groups": 4, "num_labels": 5}
    models = {name: (kind, {**own, **settings}) for name, (kind, own) in precision.MODELS.items()}
    for _, own in models.values():
        own.pop("out_features", None)
    monkeypatch.setattr(precision, "MODELS", models)
    monkeypatch.setattr(precision, "IMAGES", (2, 3, 33, 47))


@pytest.mark.usefixtures("small")
def test_the_command_writes_the_page_and_json(tmp_path, capsys):
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    status = precision.main(["--draws", "1", "--markdown", str(page), "--output", str(data)])
    text = page.read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    content = json.loads(data.read_text(encoding="utf-8"))
    for key in ("machine", "device", "command"):
        assert content[key]
    assert content["command"] in text
    assert len(content["rows"]) == len(MODES) * len(precision.MODELS)
    for row in content["rows"]:
        assert (row["ours"] is None) == bool(row["note"])
    assert precision.parts_table() in text
    for mode in MODES:
        for name in precision.MODELS:
            assert text.count(f"| {name} | {mode.name} |") == 1
    assert status == any(map(precision.is_wrong, content["rows"]))


def test_an_error_that_is_too_large_is_wrong():
    wrong = [{"ours": ours, "allowed": 2e-6} for ours in (1e-3, float("nan"))]
    right = [{"ours": 1e-6, "allowed": 2e-6}, {"ours": None, "allowed": None}]
    assert all(map(precision.is_wrong, wrong))
    assert not any(map(precision.is_wrong, right))


def test_the_page_in_the_repository_has_the_table_of_the_modes():
    page = precision.Path(precision.__file__).parent / "PRECISION.md"
    assert precision.parts_table() in page.read_text(encoding="utf-8")
