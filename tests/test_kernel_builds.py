"""The Triton kernels compile for every chip, and their machine code is what it should be. No GPU needed.

The builds run in a process of their own, without the interpreter that the other tests use. They are a sample of
the committed table, with which they must agree; what is asked of them is asked of the rest of the table too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from bench import kernel_builds
from bench.kernel_builds import (
    REGISTERS_PER_MULTIPROCESSOR,
    REGISTERS_PER_THREAD,
    SHARED_PER_PROGRAM,
    widths,
)
from bitfast.kernels import (
    group_norm_act_backward,
    group_norm_act_forward,
    resize_normalize_tiles,
    weight_standardization_tiles,
)
from tests.other_process import without_interpreter

ROOT = Path(__file__).parent.parent
COMMAND = "python -m bench.kernel_builds --output bench/results/kernel-builds.json"
TABLE = json.loads((ROOT / "bench/results/kernel-builds.json").read_text())


def kernels_of(*modules: ModuleType) -> list[str]:
    names = [
        (module.__name__.rpartition(".")[2], name) for module in modules for name in vars(module)
    ]
    return [f"{module}.{name}" for module, name in names if name.endswith("_kernel")]


WEIGHT_KERNELS = kernels_of(weight_standardization_tiles)
KERNELS = kernels_of(group_norm_act_forward, group_norm_act_backward) + WEIGHT_KERNELS
IMAGE_KERNELS = kernels_of(resize_normalize_tiles)
# What these store has a number per channel or group.
STORE_NO_TILE = ("moments_kernel", "backward_sums_kernel", "parameter_gradients_kernel")
CHIPS = ("80", "90", "100")
BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}


class Build(NamedTuple):
    title: str
    chip: str
    result: dict[str, Any]

    @property
    def kernel(self) -> str:
        return self.title.partition("(")[0]

    @property
    def types(self) -> list[str]:
        """The types of the parameters, in order, without the marks of multiples of 16."""
        types = self.title.partition("(")[2].partition(")")[0]
        return [kind.partition(":")[0] for kind in types.split()]

    def constant(self, name: str) -> str | None:
        found = re.search(rf" {name}=(\S+)", self.title)
        return found and found[1]

    def asked(self, what: str) -> dict[int, int]:
        return widths(self.result["asked"].get(what))

    def code(self, what: str) -> dict[int, int]:
        return widths(self.result["code"].get(what))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("builds") / "builds.json"
    process = subprocess.run(
        [sys.executable, "-m", "bench.kernel_builds", "--sample", "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=without_interpreter(),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def builds(table: dict[str, Any]) -> list[Build]:
    """What was built here, and what the committed table has besides."""
    results = {
        (title, chip): result
        for each in (TABLE, table)
        for title, by_chip in each["variants"].items()
        for chip, result in by_chip.items()
    }
    return [Build(title, chip, result) for (title, chip), result in results.items()]


@pytest.fixture(params=KERNELS)
def of_kernel(request: pytest.FixtureRequest, builds: list[Build]) -> list[Build]:
    """The builds of one kernel."""
    members = [build for build in builds if build.kernel == request.param]
    assert members, "this kernel was never built"
    return members


def test_every_kernel_is_built_in_every_dtype_for_every_chip(of_kernel: list[Build]) -> None:
    # The gradients of parameters have the dtype of the parameters, whose 16-bit type here is float16.
    kinds = set(BYTES) - ({"*bf16"} if "parameter_gradients" in of_kernel[0].kernel else set())
    for kind in kinds:
        for chip in CHIPS:
            assert any(build.chip == chip and kind in build.types for build in of_kernel)


def test_every_norm_kernel_is_built_with_64_bit_offsets(of_kernel: list[Build]) -> None:
    offsets = {build.constant("WIDE") for build in of_kernel}
    assert offsets in ({"True", "False"}, {None})  # None: they are always 64-bit


def test_no_spills_to_speak_of(of_kernel: list[Build]) -> None:
    # The assembler sometimes puts a number or two aside to save registers it has (8 bytes, and the
    # instructions for them), though it might use twice as many; other versions, some more.
    allowed = 16 if TABLE["triton"] == metadata.version("triton") else 32
    assert not [build for build in of_kernel if build.result["spills"] > allowed]


def test_limits_of_the_chips(of_kernel: list[Build]) -> None:
    for build in of_kernel:
        registers = build.result["registers"]
        threads = 32 * int(build.constant("warps") or 0)
        assert threads > 0
        assert 0 < registers <= REGISTERS_PER_THREAD
        assert registers * threads <= REGISTERS_PER_MULTIPROCESSOR, build
        assert build.result["shared"] <= SHARED_PER_PROGRAM[int(build.chip)]


# ---- widths of the accesses -------------------------------------------------------------------------


def is_looped(build: Build) -> bool:
    """Filters too long for a tile, or not aligned; nothing is wide there."""
    return build.constant("KIND") in ("6", "7")


def test_tiles_are_accessed_16_bytes_at_a_time(of_kernel: list[Build]) -> None:
    tiled = [b for b in of_kernel if b.constant("CHANNELS_LAST") != "False" and not is_looped(b)]
    assert tiled
    for build in tiled:
        loads, stores = build.asked("tile load"), build.asked("tile store")
        turned = build.asked("turned load"), build.asked("turned store")
        stores_tile = not build.kernel.endswith(STORE_NO_TILE)
        if build.kernel.endswith("moments_kernel"):
            stores_tile = build.constant("HAS_RESIDUAL") == "True"  # then, the sum
        assert bool(loads or turned[0]), build
        assert bool(stores or turned[1]) == stores_tile, build
        assert min([*loads, *stores]) >= 16, build


def test_machine_code_has_no_narrow_access_that_was_not_asked_for(of_kernel: list[Build]) -> None:
    for build in of_kernel:
        for action in ("load", "store"):
            kinds = [kind for kind in build.result["asked"] if kind.endswith(action)]
            if any(kind.startswith("looped") for kind in kinds):
                continue  # ptxas unrolls those loops
            narrow = sum(
                n for kind in kinds for width, n in build.asked(kind).items() if width < 16
            )
            in_code = sum(n for width, n in build.code(action).items() if width < 16)
            assert in_code <= narrow, build
            # (With one row of partial sums, all but a sixty-fourth of that tile is cut away.)
            tile = build.asked(f"tile {action}")
            if tile and min(tile) >= 16 and build.constant("rows") is None:
                assert max(build.code(action)) >= 16, build


def test_the_measure_sees_narrow_tiles(builds: list[Build]) -> None:
    # An NCHW image of 7x7 begins at odd elements, so nothing wider can be loaded.
    odd = [
        b
        for b in builds
        if b.constant("CHANNELS_LAST") == "False" and min(b.asked("tile load") or [16]) < 16
    ]
    assert odd
    assert all(min(build.code("load")) < 16 for build in odd)


@pytest.mark.parametrize("of_kernel", WEIGHT_KERNELS, indirect=True)
def test_unaligned_filters_are_accessed_element_by_element(of_kernel: list[Build]) -> None:
    """Looped filters begin anywhere, turned ones have pixels anywhere: wider would be a fault on a GPU."""
    for build in of_kernel:
        is_of_all = "_all_" in build.kernel
        types = build.types[2:4] if is_of_all else build.types[:2]  # parameter and result
        # One weight's filters may be known to have a multiple of 16 numbers: rows and inner both are.
        is_aligned = not is_of_all and "i32:16 i32:16" in build.title
        looped = () if is_aligned else ("looped load", "looped store")
        for what in ("turned load", "turned store", *looped):
            assert set(build.asked(what)) <= {BYTES[kind] for kind in types}, build


@pytest.mark.parametrize("of_kernel", WEIGHT_KERNELS, indirect=True)
def test_every_way_to_work_on_a_weight_is_built(of_kernel: list[Build]) -> None:
    members = [build for build in of_kernel if build.chip == "90"]
    if "_all_" in members[0].kernel:
        assert all({"tile load", "looped load"} <= set(b.result["asked"]) for b in members)
    else:
        assert {build.constant("KIND") for build in members} == set("01234567")


# ---- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_kernel", IMAGE_KERNELS, indirect=True)
def test_kernels_of_images(of_kernel: list[Build]) -> None:
    """Pixels of images are gathered byte by byte; the rest is as it is elsewhere."""
    assert {build.chip for build in of_kernel} == set(CHIPS)
    for build in of_kernel:
        assert build.result["spills"] <= 32
        assert 0 < build.result["registers"] <= 128  # two programs per 64 Ki registers, at least
        assert build.result["shared"] == 0
        assert min(build.code("load")) == 1
    if "second" in of_kernel[0].kernel:
        dtypes = {build.types[-3 if build.constant("width") else -4] for build in of_kernel}
        assert dtypes == set(BYTES)
        assert {build.constant("CHANNELS_LAST") for build in of_kernel} == {"True", "False"}


LIST_JOBS = """
import json
from bench.kernel_variants import quick_jobs, sampled_jobs
for jobs in (quick_jobs(), sampled_jobs()):
    print(json.dumps([(v.kernel, v.compute_type, str(chip), v.title) for v, chip in jobs]))
"""


def test_the_committed_table_has_what_it_must_and_a_sample_of_all_is_built() -> None:
    """If a kernel were not built here at all, the rest of the table would hide it."""
    process = subprocess.run(
        [sys.executable, "-c", LIST_JOBS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=without_interpreter(),  # which has launches of its own
        check=True,
    )
    needed, sampled = map(json.loads, process.stdout.splitlines())
    listed = {(title, chip) for title, by_chip in TABLE["variants"].items() for chip in by_chip}
    assert {(title, chip) for *_, chip, title in needed} <= listed, f"run {COMMAND}"
    kinds = [
        {(kernel, dtype, chip) for kernel, dtype, chip, _ in jobs} for jobs in (needed, sampled)
    ]
    assert kinds[0] == kinds[1]
    assert {kernel for kernel, *_ in sampled} == {*KERNELS, *IMAGE_KERNELS}


def test_the_committed_table_agrees(table: dict[str, Any]) -> None:
    if TABLE["triton"] != metadata.version("triton"):
        pytest.skip(f"the table is of triton {TABLE['triton']}")
    for title, by_chip in table["variants"].items():
        for chip, result in by_chip.items():
            assert result == TABLE["variants"][title][chip], f"{title}, sm_{chip}: run {COMMAND}"


# ---- reading code -----------------------------------------------------------------------------------


def test_reading_machine_code() -> None:
    code = """
        /*0300*/              @!P1 LDG.E.U16 R28, desc[UR12][R6.64] ;
        /*0310*/                   LDG.E.128.CONSTANT R28, desc[UR12][R6.64] ;
        /*0320*/                   STG.E desc[UR4][R8.64], R19 ;
        /*0330*/                   LDS.128 R4, [R2] ;
        /*0340*/                   STL.64 [R1+0x8], R4 ;
        /*0350*/              @P0  LDL R4, [R1] ;
    """
    accesses, local = kernel_builds.machine_accesses(code)
    assert accesses == {("load", 2): 1, ("load", 16): 1, ("store", 4): 1}
    assert local == 2


def test_reading_ptx(tmp_path: Path) -> None:
    source = tmp_path / "kernels.py"
    source.write_text(
        "def kernel():\n"
        "    value = tl.load(x + offset, inside)\n"
        "    scale = tl.load(weight + channel, exists)\n"
        "    tl.store(result + offset, value, inside)\n"
    )
    code = f"""
        .loc 1 2 4
        // begin inline asm
        .loc 1 2 4
        mov.u32 %r1, 0x0;
        .loc 1 3 4
        @%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
        // end inline asm
        .loc 1 3 4
        ld.global.L1::evict_last.v2.b32 {{ %r1, %r2 }}, [ %rd1 + 0 ];
        .loc 1 4 4
        st.global.b16 [ %rd1 + 0 ], {{ %rs1 }};
        st.shared.v4.b32 [ %r2 + 0 ], {{ %r1, %r2, %r3, %r4 }};
        .file 1 "{source}"
    """
    assert kernel_builds.asked_accesses(code) == {
        ("tile load", 16): 1,
        ("vector load", 8): 1,
        ("tile store", 2): 1,
    }
