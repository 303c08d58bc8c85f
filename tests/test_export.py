"""Exported programs: which operators they call, in a process without bitfast, as ONNX files."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import bitfast
from bitfast import extension
from bitfast.export import exportable
from bitfast.ops.norm_convolution import _why_no_norm_convolution
from tests.model_pairs import (
    assert_as_exact,
    flatten,
    move_weights,
    our_model,
    their_model,
)
from tests.requirements import NEEDS_EXTENSION
from tests.tolerances import Triples, assert_draws_within_contract

ONE_STAGE = {"depths": [1], "hidden_sizes": [16]}
SAME = {"global_padding": "same", "embedding_dynamic_padding": True}
SIZES = [(2, 33, 47), (3, 64, 50), (5, 40, 70), (2, 9, 10)]
DYNAMIC = {
    "pixel_values": {0: Dim("batch", max=64), 2: Dim("height", min=9), 3: Dim("width", min=9)}
}
STANDARDIZATION = "bitfast.weight_standardization"
NORMS = ("bitfast.group_norm_act", "bitfast.add_group_norm_act")


def evaluated(name: str, **settings: Any) -> Any:
    model = our_model(name, **{**ONE_STAGE, **settings}).eval()
    move_weights(model)
    return model


def drawn(size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    batch, height, width = size
    return torch.randn(batch, 3, height, width).to(dtype)


def exported(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    return torch.export.export(model, (drawn(SIZES[0], dtype),), dynamic_shapes=DYNAMIC)


def results(model: Any, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(images))


def runner(program: torch.export.ExportedProgram) -> Callable[[Tensor], list[Tensor]]:
    module = program.module()
    return lambda images: results(module, images)


def in_float64(model: nn.Module, images: Tensor) -> list[Tensor]:
    return results(copy.deepcopy(model).double(), images.double())


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Return the operators of bitfast's that a program calls."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target for target in targets if target.startswith("bitfast.")}


def assert_runs_like(
    model: nn.Module, dtype: torch.dtype, run: Callable[[Tensor], list[Tensor]]
) -> None:
    """Hold ``run`` at all sizes together to the contract, with the model itself as the yardstick."""

    def draw() -> Triples:
        batches = [drawn(size, dtype) for size in SIZES]
        ours, plain, exact = (
            [torch.cat([t.flatten() for t in tensors]) for tensors in zip(*outputs, strict=True)]
            for outputs in (
                [run(images) for images in batches],
                [results(model, images) for images in batches],
                [in_float64(model, images) for images in batches],
            )
        )
        return {f"output {n}": each for n, each in enumerate(zip(ours, plain, exact, strict=True))}

    assert_draws_within_contract(draw, 2)


# ---- operators --------------------------------------------------------------------------------


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("layer_type", "dtype", "backend"),
    [
        ("preactivation", torch.float32, None),
        ("bottleneck", torch.bfloat16, None),
        ("preactivation", torch.bfloat16, "native"),
        ("bottleneck", torch.float32, "native"),
        ("preactivation", torch.float32, "reference"),
        ("bottleneck", torch.bfloat16, "reference"),
    ],
)
def test_a_program_calls_the_ops_of_the_backend(layer_type, dtype, backend):
    model = evaluated("BitBackbone", layer_type=layer_type, **SAME).to(dtype)
    with bitfast.use_backend(backend) if backend else nullcontext():
        program = exported(model, dtype)
    called = operators(program)
    if backend == "reference":
        assert not called
    else:
        assert f"{STANDARDIZATION}.native" in called
        assert any(name.startswith(NORMS) for name in called)
        assert ("bitfast.same_max_pool.native" in called) == (backend == "native")
    assert_runs_like(model, dtype, runner(program))


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("name", "layer_type"),
    [
        ("BitModel", "preactivation"),
        ("BitForImageClassification", "bottleneck"),
        ("BitBackbone", "preactivation"),
    ],
)
def test_a_program_traced_without_gradients(name, layer_type):
    model = evaluated(name, layer_type=layer_type)
    _why_no_norm_convolution.cache_clear()  # the question is no part of the program
    with torch.no_grad():
        program = exported(model)
    assert operators(program)
    assert all(name.startswith((STANDARDIZATION, *NORMS)) for name in operators(program))
    assert_runs_like(model, torch.float32, runner(program))


# ---- models to export -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_type", "dtype"),
    [
        ("preactivation", torch.float32),
        ("bottleneck", torch.float32),
        ("preactivation", torch.bfloat16),
        ("bottleneck", torch.float16),
    ],
)
def test_an_exportable_model_has_the_same_numbers(layer_type, dtype):
    model = evaluated("BitForImageClassification", layer_type=layer_type, **SAME).to(dtype)
    program = exported(exportable(model), dtype)
    assert not any(name.startswith(STANDARDIZATION) for name in operators(program))
    twin = exportable(model)
    assert_runs_like(model, dtype, lambda images: results(twin, images))
    assert_runs_like(model, dtype, runner(program))


@NEEDS_EXTENSION
def test_a_program_may_be_channels_last():
    model = evaluated("BitForImageClassification", **SAME)
    twin = exportable(model).to(memory_format=torch.channels_last)
    layout = {"memory_format": torch.channels_last}
    images = drawn(SIZES[0]).contiguous(**layout)
    run = runner(torch.export.export(twin, (images,), dynamic_shapes=DYNAMIC))
    assert_runs_like(model, torch.float32, lambda images: run(images.contiguous(**layout)))


def test_an_exportable_model_returns_tensors_in_evaluation_without_gradients():
    model = evaluated("BitModel").train()
    twin = exportable(model)
    assert type(twin) is type(model)
    assert not twin.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    output = twin(drawn(SIZES[0]))
    assert type(output) is tuple
    assert all(type(tensor) is Tensor for tensor in output)


def test_making_an_exportable_model_leaves_the_model_alone():
    model = evaluated("BitForImageClassification").train()
    before = copy.deepcopy(model.state_dict())
    exportable(model)
    assert model.training
    assert model.config.return_dict
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_accelerated_model_of_transformers_is_exported():
    theirs = their_model("BitBackbone", **ONE_STAGE, out_features=["stage1"]).eval()
    move_weights(theirs)
    plain = copy.deepcopy(theirs)
    bitfast.accelerate(theirs)
    program = torch.export.export(
        exportable(theirs), (drawn(SIZES[0]),), dynamic_shapes=DYNAMIC, strict=False
    )
    assert not any(name.startswith(STANDARDIZATION) for name in operators(program))
    run = runner(program)
    for size in SIZES:
        images = drawn(size)
        assert_as_exact(run(images), results(plain, images), in_float64(plain, images))


# ---- a process without bitfast ------------------------------------------------------------------

FRESH = """
import sys
import torch

library, folder, *names = sys.argv[1:]
torch.ops.load_library(library)
images = torch.load(f"{folder}/images.pt")
for name in names:
    if name.endswith(".aoti.pt2"):
        run = torch._inductor.aoti_load_package(f"{folder}/{name}")
    else:
        run = torch.export.load(f"{folder}/{name}").module()
    with torch.no_grad():
        torch.save([list(run(x)) for x in images], f"{folder}/{name}.out")
assert not [name for name in sys.modules if name.partition(".")[0] == "bitfast"]
"""


def run_fresh(
    folder: Path, images: list[Tensor], names: list[str]
) -> subprocess.CompletedProcess[str]:
    """Run saved programs in a new process that has torch and the extension, and no bitfast."""
    torch.save(images, folder / "images.pt")
    # Not even the current folder, which may hold bitfast, is looked for modules in.
    isolated = "-P" if sys.version_info >= (3, 11) else "-I"
    command = [sys.executable, isolated, "-c", FRESH, extension.CPU.path, str(folder), *names]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def run_elsewhere(folder: Path, images: list[Tensor], names: list[str]) -> list[list[list[Tensor]]]:
    """Return what each of some saved programs makes of each batch of images there."""
    finished = run_fresh(folder, images, names)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(folder / f"{name}.out") for name in names]


class Both(nn.Module):
    """A model as it is and in its exportable form, of which one compilation makes one package."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = model
        self.exportable = exportable(model)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole(pixel_values)[0], self.exportable(pixel_values)[0]


@NEEDS_EXTENSION
def test_programs_run_in_a_process_without_bitfast(tmp_path):
    model = evaluated("BitForImageClassification", return_dict=False)
    with torch.no_grad():
        program = exported(Both(model))
    assert f"{STANDARDIZATION}.native" in operators(program)
    torch.export.save(program, tmp_path / "both.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "both.aoti.pt2"))
    images = [drawn(size) for size in SIZES]
    for outputs in run_elsewhere(tmp_path, images, ["both.pt2", "both.aoti.pt2"]):
        for x, actual in zip(images, outputs, strict=True):
            plain, exact = results(model, x), in_float64(model, x)
            assert_as_exact(actual, plain * 2, exact * 2)


@NEEDS_EXTENSION
def test_a_process_without_bitfast_cannot_load_what_returns_its_classes(tmp_path):
    torch.export.save(exported(evaluated("BitModel")), tmp_path / "classes.pt2")
    finished = run_fresh(tmp_path, [drawn(SIZES[0])], ["classes.pt2"])
    assert finished.returncode != 0
    assert "bitfast.outputs.BaseModelOutputWithPoolingAndNoAttention" in finished.stderr


# ---- ONNX -------------------------------------------------------------------------------------


def onnx_session(model: nn.Module, backend: AbstractContextManager[None], folder: Path) -> Any:
    with backend:
        program = torch.onnx.export(
            model, (drawn(SIZES[0]),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
        )
    path = folder / "model.onnx"
    program.save(path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_onnx(session: Any, images: Tensor) -> list[Tensor]:
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


@pytest.mark.parametrize(
    ("name", "layer_type", "padding"),
    [
        ("BitModel", "preactivation", {}),
        ("BitModel", "bottleneck", SAME),
        ("BitForImageClassification", "preactivation", SAME),
        ("BitForImageClassification", "bottleneck", {}),
        ("BitBackbone", "preactivation", SAME),
        ("BitBackbone", "bottleneck", {}),
    ],
)
def test_onnx_runtime_gives_the_same_numbers(name, layer_type, padding, tmp_path):
    model = evaluated(name, layer_type=layer_type, **padding)
    session = onnx_session(model, bitfast.use_backend("reference"), tmp_path)
    for size in SIZES:
        images = drawn(size)
        exact = in_float64(model, images)
        assert_as_exact(run_onnx(session, images), results(model, images), exact)


def test_an_onnx_file_of_an_exportable_model_bears_filters_far_from_zero(tmp_path):
    model = evaluated("BitModel", layer_type="bottleneck")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                deviation = parameter.flatten(1).std(1)[:, None, None, None]
                parameter.add_(100 * deviation)
    session = onnx_session(exportable(model), bitfast.use_backend("reference"), tmp_path)
    for size in SIZES:
        images = drawn(size)
        exact = in_float64(model, images)
        assert_as_exact(run_onnx(session, images), results(model, images), exact)


@NEEDS_EXTENSION
def test_onnx_without_the_reference_names_the_op_that_it_lacks(tmp_path):
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as raised:
        onnx_session(evaluated("BitModel"), nullcontext(), tmp_path)
    assert "bitfast.weight_standardization" in str(raised.value).replace("', overload='", ".")
