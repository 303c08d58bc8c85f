"""The choice of a backend, the demand for one, and the table that says why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitfast import backends, extension
from bitfast.backends import (
    BACKENDS,
    OPS,
    BackendUnavailableError,
    backend_table,
    register_kernel,
    select_backend,
    use_backend,
    why_unavailable,
)
from bitfast.ops import common
from bitfast.ops.group_norm_act import group_norm_act
from tests.other_process import without_interpreter
from tests.threads import in_threads

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("op", OPS)
def test_the_reference_serves_everything(op: str) -> None:
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float32, torch.float64, torch.uint8):
            assert why_unavailable(op, "reference", device, dtype) is None
            assert select_backend(op, device, dtype) in BACKENDS


def test_the_best_available_is_the_default() -> None:
    assert select_backend("same_padding", "cpu", torch.float32) == "native"
    assert select_backend("same_padding", "cpu", torch.float64) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_an_op_s_demand_is_met_or_refused(op: str) -> None:
    for backend in BACKENDS:
        reason = why_unavailable(op, backend, "cpu", torch.float32)
        with use_backend(**{op: backend}):
            if reason is None:
                assert select_backend(op, "cpu", torch.float32) == backend
            else:
                with pytest.raises(BackendUnavailableError) as raised:
                    select_backend(op, "cpu", torch.float32)
                assert op in str(raised.value)
                assert reason in str(raised.value)


def test_demands_nest_and_end() -> None:
    with use_backend("reference"):
        with use_backend(same_padding="native"):
            assert select_backend("same_padding", "cpu", torch.float32) == "native"
            assert backends.requested_backend("group_norm_act") == "reference"
        assert select_backend("same_padding", "cpu", torch.float32) == "reference"
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        assert backends.requested_backend("same_padding") == "reference"
    assert backends.requested_backend("same_padding") is None


def test_a_named_op_wins_over_the_general_demand() -> None:
    with use_backend("reference", same_padding="native"):
        assert backends.requested_backend("same_padding") == "native"
        assert backends.requested_backend("resize_normalize") == "reference"


def test_a_demand_concerns_one_thread() -> None:
    seen: list[str | None] = []
    with use_backend("reference"):
        in_threads(lambda _: seen.append(backends.requested_backend("same_padding")), 1)
    assert seen == [None]


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (
            lambda: use_backend(),
            "use_backend needs a backend; choose from native, triton, reference",
        ),
        (lambda: use_backend("cuda"), "unknown backend 'cuda'; choose from native, triton"),
        (lambda: use_backend(pooling="native"), "unknown op 'pooling'; choose from weight_"),
        (lambda: use_backend(same_padding="fast"), "unknown backend 'fast'"),
    ],
)
def test_an_impossible_demand_is_an_error(demand, message: str) -> None:
    with pytest.raises(ValueError, match=message), demand():
        pass


def test_the_table_has_a_reason_for_everything_that_is_missing() -> None:
    rows = backend_table()
    assert [(r.op, r.device, r.backend) for r in rows] == [
        (op, device, backend) for op in OPS for device in ("cpu", "cuda") for backend in BACKENDS
    ]
    for row in rows:
        assert row.available == (row.reason == "")
        assert row.available or not row.default
    for op in OPS:
        cpu = [r for r in rows if (r.op, r.device) == (op, "cpu")]
        assert sum(r.default for r in cpu) == 1
    pads = {r.backend: r for r in rows if (r.op, r.device) == ("same_padding", "cpu")}
    assert pads["native"].default
    assert "no triton kernel" in pads["triton"].reason


def run(code: str, folder: Path) -> str:
    """Run code in a fresh process whose ``bitfast`` is the one in ``folder``."""
    # An editable installation has an importer of its own, which would find what is missing here.
    own = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    code = f"import sys; {own}; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    ).stdout


@pytest.mark.parametrize("broken", ["missing", "not a library"])
def test_without_the_extension_plain_pytorch_serves_and_says_why(
    broken: str, tmp_path: Path
) -> None:
    (tmp_path / "bitfast").mkdir()
    for path in (ROOT / "bitfast").iterdir():
        if path.suffix != ".so":
            (tmp_path / "bitfast" / path.name).symlink_to(path)
    (tmp_path / "bitfast" / "kernels").symlink_to(ROOT / "kernels")
    if broken == "not a library":
        (tmp_path / "bitfast" / "_native.abi3.so").write_bytes(b"not a library")
    output = run(
        "import torch, bitfast\n"
        "from bitfast.ops.same_padding import same_pad\n"
        "from bitfast.backends import why_unavailable, use_backend\n"
        "print(bitfast.__file__)\n"
        "print(why_unavailable('same_padding', 'native', 'cpu'))\n"
        "print(same_pad(torch.zeros(1, 1, 3, 3), 3, 2).shape)\n"
        "try:\n"
        "    with use_backend('native'): same_pad(torch.zeros(1, 1, 3, 3), 3, 2)\n"
        "except bitfast.BackendUnavailableError as error: print(error)\n",
        tmp_path,
    )
    file, reason, shape, error = output.splitlines()
    assert file == str(tmp_path / "bitfast" / "__init__.py")
    assert ("was not built" if broken == "missing" else "cannot be loaded") in reason
    assert "install bitfast from source" in reason
    assert shape == "torch.Size([1, 1, 5, 5])"
    assert reason in error


def test_the_cuda_half_says_why_it_is_not_loaded() -> None:
    if torch.version.cuda is None:
        assert extension.CUDA.problem == "this torch was built without CUDA"
    else:
        assert extension.CUDA.problem is None


def test_a_kernel_of_one_memory_format_is_chosen_for_no_other(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_kernels", {})
    channels_last, contiguous = torch.channels_last, torch.contiguous_format
    register_kernel(
        "group_norm_act", "native", "meta", frozenset({torch.float32}), lambda: None,
        memory_format=channels_last,
    )  # fmt: skip
    chosen = [
        select_backend("group_norm_act", "meta", torch.float32, memory_format)
        for memory_format in (None, channels_last, contiguous)
    ]
    assert chosen == ["native", "native", "reference"]
    with use_backend("native"), pytest.raises(BackendUnavailableError, match="channels_last, not"):
        select_backend("group_norm_act", "meta", torch.float32, contiguous)


# ---- Triton ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"torch.cuda.is_available": False}, "no CUDA device"),
        ({"torch.version.hip": "6.0"}, "AMD"),
        ({"importlib.util.find_spec": None}, "triton is not installed"),
        ({"bitfast.ops.common._is_interpreting": True}, "TRITON_INTERPRET is set"),
        ({"importlib.metadata.version": "3.5.1"}, r"triton 3.5.1 is older than 3.6"),
        ({"torch.cuda.get_device_capability": (7, 5)}, r"capability is 7.5, 8.0 is needed"),
        ({}, None),
    ],
)
def test_why_there_are_no_triton_kernels(changes, reason, monkeypatch) -> None:
    values = {
        "torch.cuda.is_available": True,
        "torch.version.hip": None,
        "bitfast.ops.common._is_interpreting": False,
        "importlib.metadata.version": "3.10.0",
        "torch.cuda.get_device_capability": (9, 0),
        **changes,
    }
    for name, value in values.items():
        is_function = name != "torch.version.hip"
        monkeypatch.setattr(name, (lambda *_, v=value: v) if is_function else value, raising=False)
    found = common._why_no_triton.__wrapped__()
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)


def test_kernels_on_demand_are_no_default() -> None:
    for op in ("group_norm_act", "weight_standardization"):
        row = next(
            r for r in backend_table() if (r.op, r.device, r.backend) == (op, "cpu", "triton")
        )
        assert row.available == (common.why_no_interpreter() is None)
        assert not row.default
        assert select_backend(op, "cpu", torch.float32) != "triton"
        if row.available:
            with use_backend("triton"):
                assert select_backend(op, "cpu", torch.float32) == "triton"
                with pytest.raises(BackendUnavailableError, match="float64"):
                    select_backend(op, "cpu", torch.float64)


def test_asking_for_triton_can_be_traced(monkeypatch, fresh_compiler) -> None:
    """Neither question can be traced into; both have constant answers."""
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))
    for device, reason in (("cpu", common.why_no_triton), ("meta", common.why_no_interpreter)):
        register_kernel("group_norm_act", "triton", device, common.TRITON_DTYPES, reason)
    x, ones = torch.randn(2, 4, 3, 3), torch.ones(4)
    compiled = torch.compile(group_norm_act, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, ones, ones, 2), group_norm_act(x, ones, ones, 2))


def test_the_commands_say_why_triton_does_not_serve_the_cpu() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "bitfast", "env"],
        env=without_interpreter(), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    line = next(
        line for line in process.stdout.splitlines()
        if "group_norm_act" in line and "cpu" in line and "triton" in line
    )  # fmt: skip
    assert "run on GPUs" in line
