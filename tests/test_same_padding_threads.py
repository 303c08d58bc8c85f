"""What a CUDA thread of same_padding computes, run on the host: the proof there is without a GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from bitfast.memory_format import is_channels_last
from bitfast.ops.same_padding import same_padding

ROOT = Path(__file__).parent.parent
SENTINEL = 77


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "threads.so"
    source = ROOT / "tests" / "host" / "same_padding_threads.cpp"
    folders = [f"-I{folder}" for folder in (ROOT / "csrc", *include_paths())]
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, *folders, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def struct(*fields: str, last: Any = ctypes.c_int64) -> type[ctypes.Structure]:
    types = [ctypes.c_int64] * (len(fields) - 1) + [last]
    return type("Struct", (ctypes.Structure,), {"_fields_": list(zip(fields, types, strict=True))})


Size = struct("height", "width")
Strides = struct("batch", "channel", "row", "column")
Window = struct("kh", "kw", "sh", "sw", "dh", "dw", "top", "left")
Layout = struct("channels", "height", "width", "channels_last", last=ctypes.c_bool)


def layout_of(x: Tensor) -> Any:
    return Layout(*x.shape[1:], is_channels_last(x))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def poisoned(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor like the one given to write to, and the memory right behind it."""
    count = like.numel()
    memory = torch.full((count + 8,), SENTINEL, dtype=like.dtype)
    return torch.as_strided(memory, like.shape, like.stride()), memory[count:]


@settings(max_examples=150)
@given(
    window=st.tuples(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ),
    sides=st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    shape=st.tuples(*(st.integers(1, n) for n in (2, 5, 9, 9))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    index=st.sampled_from(["uint32", "int64"]),
    value=st.sampled_from([0.0, -0.5, float("nan")]),
    seed=st.integers(0, 2**31 - 1),
)
def test_threads_equal_the_reference(
    threads, window, sides, shape, dtype, layout, index, value, seed
) -> None:
    torch.manual_seed(seed)
    sides = sides or same_padding(shape[2:], *window)
    for axis in (0, 1):
        padded = shape[2 + axis] + sides[2 * axis] + sides[2 * axis + 1]
        assume(padded > (window[0][axis] - 1) * window[2][axis])
    x = (torch.randint(-4, 9, shape).clamp_min(-2) / 4).to(dtype).contiguous(memory_format=layout)
    suffix = f"{str(dtype).removeprefix('torch.')}_{index}"
    geometry = Window(*window[0], *window[1], *window[2], sides[0], sides[2])

    expected = torch.ops.bitfast.same_pad.reference(x, sides, value)
    result, behind = poisoned(expected)
    getattr(threads, f"pad_{suffix}")(
        pointer(x), Size(*shape[2:]), Strides(*x.stride()), ctypes.c_int64(sides[0]),
        ctypes.c_int64(sides[2]), ctypes.c_float(value), pointer(result), layout_of(expected),
        ctypes.c_int64(expected.numel()),
    )  # fmt: skip
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert (behind == SENTINEL).all()

    pool = torch.ops.bitfast.same_max_pool.reference
    expected, expected_taps = pool(x, *window, sides, value, True)
    result, behind = poisoned(expected)
    taps, _ = poisoned(expected_taps)
    getattr(threads, f"pool_{suffix}")(
        pointer(x), Size(*shape[2:]), Strides(*x.stride()), geometry, ctypes.c_float(value),
        pointer(result), pointer(taps), layout_of(expected), ctypes.c_int64(expected.numel()),
    )  # fmt: skip
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(taps, expected_taps)
    assert (behind == SENTINEL).all()

    grad = torch.randint(-3, 4, taps.shape).to(dtype).contiguous(memory_format=layout)
    grad = torch.empty_like(taps, dtype=dtype).copy_(grad)
    backward = torch.ops.bitfast.same_max_pool_backward.reference
    expected = backward(grad, taps, shape[2:], *window, sides)
    result, behind = poisoned(expected)
    getattr(threads, f"pool_backward_{suffix}")(
        pointer(grad), pointer(taps), Size(*taps.shape[2:]), Strides(*taps.stride()), geometry,
        pointer(result), layout_of(expected), ctypes.c_int64(expected.numel()),
    )  # fmt: skip
    assert torch.equal(result, expected)
    assert (behind == SENTINEL).all()
