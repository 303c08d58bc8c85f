"""The choice of a backend, the demand for one, and the table that says why."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bitfast import backends, extension
from bitfast.backends import (
    BACKENDS,
    OPS,
    BackendUnavailableError,
    backend_table,
    select_backend,
    use_backend,
    why_unavailable,
)

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
        thread = threading.Thread(
            target=lambda: seen.append(backends.requested_backend("same_padding"))
        )
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (
            lambda: use_backend(),
            "use_backend needs a backend; choose from triton, native, reference",
        ),
        (lambda: use_backend("cuda"), "unknown backend 'cuda'; choose from triton, native"),
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
    if broken == "not a library":
        (tmp_path / "bitfast" / "_native.abi3.so").write_bytes(b"not a library")
    output = run(
        "import torch, bitfast\n"
        "from bitfast.ops import same_pad\n"
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
