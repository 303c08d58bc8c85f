"""What gets built and installed, and what an import costs."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import bitfast.kernels
from tests import native_errors
from tests.versions import TORCH

ROOT = Path(__file__).parent.parent
SOURCES = (
    "bitfast",
    "bench",
    "kernels",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
HAS_NVCC = shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


def copy_sources(folder: Path) -> Path:
    """Copy the sources, without anything that was built."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "source")


def build(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # As `pip install .` builds; the torch that is installed here is built with.
    command = [
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(target),
    ]
    return subprocess.run(
        [sys.executable, *command, str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=target.parent,
    )


def built_wheel(source: Path, target: Path, **environment: str) -> Path:
    process = build(source, target, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = target.iterdir()
    return wheel


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def run_installed(wheel: Path, code: str) -> str:
    """Unpack a wheel and run code on it, in a process that sees no other bitfast."""
    folder = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    own = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    code = f"import sys; {own}; sys.path.insert(0, {str(folder)!r})\n{code}"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole wheel, and with a static standard library, as some distributions build.

    What is built is under test, not how well: unoptimized, it takes less than half of the time.
    """
    folder = tmp_path_factory.mktemp("packaging")
    source = copy_sources(folder / "source")
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O0"'))
    return built_wheel(
        source,
        folder / "wheels",
        LDFLAGS="-static-libstdc++",
        NVCC_APPEND_FLAGS="-Xcicc -O0 -Xptxas -O0",
    )


def test_the_wheel_serves_every_python_and_holds_everything(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    names = names_in(wheel)
    for needed in (
        "bitfast/bench/contestant.py",
        "bitfast/kernels/__init__.py",
        "bitfast/ops/same_padding.py",
        "bitfast/checkpoints/hub.py",
        "bitfast/digits/model/model.safetensors",
        "bitfast/_native.abi3.so",
    ):
        assert needed in names
    # "kernels" is another project's name.
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bitfast"}
    assert ("bitfast/_native_cuda.abi3.so" in names) == HAS_NVCC
    output = run_installed(
        wheel,
        "import torch, bitfast.kernels, bitfast.backends\n"
        "from bitfast.ops.same_padding import same_max_pool\n"
        "print(bitfast.__file__)\n"
        "print(bitfast.kernels.__file__)\n"
        "with bitfast.use_backend('native'): print(same_max_pool(torch.ones(1, 1, 5, 5), 3, 2).sum())\n",
    )
    installed = wheel.parent / "installed" / "bitfast"
    assert output.splitlines() == [
        str(installed / "__init__.py"),
        str(installed / "kernels" / "__init__.py"),
        "tensor(9.)",
    ]


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_the_cuda_half_is_for_every_chip(wheel: Path, tmp_path: Path) -> None:
    """Machine code for sm_80 and sm_90a, and PTX, as the disassembler of Triton's wheel sees it."""
    import triton

    library = zipfile.ZipFile(wheel).extract("bitfast/_native_cuda.abi3.so", tmp_path)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    output = subprocess.run(
        [cuobjdump, "--list-elf", "--list-ptx", library], capture_output=True, text=True, check=True
    ).stdout
    for expected in (".sm_80.cubin", ".sm_90a.cubin", ".sm_90.ptx"):
        assert expected in output, output


def test_messages_are_whole_with_a_static_standard_library(wheel: Path, tmp_path: Path) -> None:
    """No iostream could write them there."""
    library = zipfile.ZipFile(wheel).extract("bitfast/_native.abi3.so", tmp_path)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in needed.stdout
    assert "libstdc++" not in needed.stdout
    native_errors.assert_whole(native_errors.messages(Path(library)))


def test_without_nvcc_only_the_cpu_half_is_built(source: Path, tmp_path: Path) -> None:
    # Which libraries, not what is in them: a single file of the CPU half will do.
    for path in (source / "csrc").glob("*.cpp"):
        if path.name != "resampling_weights.cpp":
            path.unlink()
    wheel = built_wheel(source, tmp_path / "wheels", CUDA_HOME=str(tmp_path / "nowhere"))
    names = names_in(wheel)
    assert "bitfast/_native.abi3.so" in names
    assert "bitfast/_native_cuda.abi3.so" not in names


def test_without_the_extension_the_wheel_is_pure_and_works(source: Path, tmp_path: Path) -> None:
    wheel = built_wheel(source, tmp_path / "wheels", BITFAST_EXTENSION="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    output = run_installed(
        wheel,
        "import torch, bitfast\n"
        "from bitfast.backends import why_unavailable\n"
        "model = bitfast.BitModel(bitfast.BitConfig(depths=[1, 1, 1, 1], global_padding='same'))\n"
        "print(model(torch.zeros(1, 3, 32, 32)).pooler_output.shape)\n"
        "print(why_unavailable('same_padding', 'native', 'cpu'))\n",
    )
    assert output.splitlines()[0] == "torch.Size([1, 2048, 1, 1])"
    assert "was not built" in output.splitlines()[1]


def test_a_failing_compile_fails_and_says_how_to_do_without(source: Path, tmp_path: Path) -> None:
    for path in (source / "csrc").glob("*.cpp"):  # all, so that the first one ends it
        path.write_text("#error broken on purpose\n")
    process = build(source, tmp_path / "wheels", BITFAST_EXTENSION="cpu")
    output = process.stdout + process.stderr
    assert process.returncode != 0
    assert "broken on purpose" in output
    assert "set BITFAST_EXTENSION=none" in output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BITFAST_EXTENSION": "yes"}, "must be one of auto, cpu, cuda, none, got 'yes'"),
        ({"BITFAST_EXTENSION": "cuda", "CUDA_HOME": "/nowhere"}, "no nvcc was found"),
    ],
)
def test_a_wrong_choice_is_named(
    environment: dict[str, str], message: str, source: Path, tmp_path: Path
) -> None:
    process = build(source, tmp_path / "wheels", **environment)
    assert process.returncode != 0
    assert message in process.stdout + process.stderr


def test_the_source_distribution_can_be_built_from(source: Path) -> None:
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    expected = {
        str(path.relative_to(ROOT))
        for folder, pattern in (
            ("csrc", "*"),
            ("bench", "*.py"),
            ("kernels", "*.py"),
            ("bitfast", "**/*.py"),
        )
        for path in (ROOT / folder).glob(pattern)
    }
    expected |= {
        f"bitfast/digits/model/{p.name}" for p in (ROOT / "bitfast/digits/model").iterdir()
    }
    assert expected - names == set()


def test_the_editable_installation_maps_the_kernels() -> None:
    assert Path(bitfast.kernels.__file__) == ROOT / "kernels" / "__init__.py"


def test_few_dependencies() -> None:
    core = {"torch", "triton", "numpy", "pillow", "safetensors", "huggingface_hub"}
    required = [r for r in metadata.requires("bitfast") or [] if "extra ==" not in r]
    assert {r.split(";")[0].split(">")[0].strip() for r in required} == core
    extras = metadata.metadata("bitfast").get_all("Provides-Extra")
    assert {"test", "bench", "dev"} <= set(extras or [])


IMPORT = """
import gc, sys, time
gc.disable()  # one collection of what torch has made costs as much as all of bitfast, whoever triggers it
start = time.perf_counter()
import torch
middle = time.perf_counter()
import bitfast
end = time.perf_counter()
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"triton", "transformers", "torchvision", "huggingface_hub", "sklearn"}, loaded
assert not torch.cuda.is_initialized()
print((end - middle) / (middle - start))
"""


def test_an_import_costs_little_and_loads_nothing_heavy() -> None:
    # An installed package has its bytecode beside it, as torch has here: the first import writes bitfast's.
    writing = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    _, *shares = (
        float(
            subprocess.run(
                [sys.executable, "-c", IMPORT],
                capture_output=True,
                text=True,
                check=True,
                env=writing,
            ).stdout
        )
        for _ in range(6)
    )
    assert statistics.median(shares) <= 0.15, shares


def test_no_version_of_torch_below_the_oldest_supported() -> None:
    """setup.py compiles for torch 2.11; what runs here must not be older."""
    assert TORCH >= (2, 11)
