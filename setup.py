"""Builds the C++/CUDA extension; everything else stands in pyproject.toml.

Two shared libraries on PyTorch's stable ABI: ``bitfast._native`` (schemas and CPU kernels) always,
``bitfast._native_cuda`` where nvcc is found. That needs neither a GPU nor a torch with CUDA, which is
why torch's own CUDAExtension cannot be used: it asks for the latter.

Environment: ``BITFAST_EXTENSION`` is "auto" (the default), "cpu" (without the CUDA half), "cuda" (nvcc
must be there) or "none" (no extension: plain PyTorch serves). ``CUDA_HOME`` says where nvcc is, if it
is not on the PATH.
"""

import copy
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("auto", "cpu", "cuda", "none")
WITHOUT_EXTENSION = (
    "bitfast also works without its extension, more slowly: set BITFAST_EXTENSION=none "
    "(BITFAST_EXTENSION=cpu leaves out only the CUDA half) and install again."
)
COMPILE = ["-O3", "-std=c++17", "-g0", "-ffp-contract=fast"]
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # runs with torch 2.11 and everything after it
    ("Py_LIMITED_API", "0x030a0000"),
]
# Machine code for the A100 and the H100 (with the instructions that no other GPU has), and PTX from which the
# driver compiles for what comes after.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]


def extension_choice() -> str:
    """Return what BITFAST_EXTENSION asks for."""
    choice = os.environ.get("BITFAST_EXTENSION", "auto").lower()
    if choice not in CHOICES:
        raise SystemExit(f"BITFAST_EXTENSION must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def find_cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit whose nvcc can be used, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return Path(home) if Path(home, "bin", "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda")]
    if nvcc is not None:
        candidates.insert(0, Path(nvcc).resolve().parents[1])
    return next((c for c in candidates if Path(c, "include", "cuda_runtime.h").exists()), None)


def extensions(cuda_home: Path | None) -> list[Extension]:
    """Describe the libraries to build."""
    # Only here, so that an installation without the extension needs no torch to build.
    from torch.utils.cpp_extension import include_paths, library_paths

    common = {
        "depends": glob("csrc/*.h"),
        "extra_compile_args": [*COMPILE, "-fvisibility=hidden"],
        "language": "c++",
        "py_limited_api": True,
    }
    torch_libraries = {"libraries": ["c10", "torch_cpu"], "library_dirs": library_paths()}
    halves = [
        Extension(
            "bitfast._native",
            sorted(set(glob("csrc/*.cpp")) - set(glob("csrc/*_cuda.cpp"))),
            include_dirs=include_paths(),
            define_macros=MACROS,
            **torch_libraries,
            **common,
        )
    ]
    if cuda_home is not None:
        halves.append(
            Extension(
                "bitfast._native_cuda",
                # Kernels, and the operators that launch them.
                sorted(glob("csrc/*.cu") + glob("csrc/*_cuda.cpp")),
                include_dirs=[*include_paths(), str(cuda_home / "include")],
                define_macros=[
                    *MACROS,
                    ("USE_CUDA", "1"),
                ],  # torch's header declares the stream then
                extra_objects=[str(cudart_static(cuda_home))],
                # libtorch.so, though unused itself, leads the loader to the libtorch_cuda.so of a torch
                # with CUDA; the torch of the build may have none to link with.
                extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ldl", "-lrt", "-lpthread"],
                **torch_libraries,
                **common,
            )
        )
    return halves


def cudart_static(cuda_home: Path) -> Path:
    """Return the CUDA runtime to link in, so that any driver serves."""
    found = [
        path
        for folder in ("lib64", "lib", "targets/*/lib")
        for path in sorted(cuda_home.glob(f"{folder}/libcudart_static.a"))
    ]
    if not found:
        raise SystemExit(f"{cuda_home} has nvcc but no libcudart_static.a. {WITHOUT_EXTENSION}")
    return found[0]


class BuildNative(build_ext):
    """Compiles .cu files with nvcc, and says on failure how to do without the extension."""

    cuda_home: Path

    def build_extensions(self) -> None:
        """Build all libraries."""
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"building bitfast's extension failed: {error}\n{WITHOUT_EXTENSION}"
            ) from error

    def build_extension(self, ext: Extension) -> None:
        """Build one library."""
        ext = copy.copy(ext)
        # The longest first, side by side.
        sources = sorted(ext.sources, key=os.path.getsize, reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile(source, ext), sources))
        ext.depends = [*ext.depends, *ext.sources]  # which decide whether it is linked again
        ext.sources = []
        ext.extra_objects = [*objects, *ext.extra_objects]
        super().build_extension(ext)

    def compile(self, source: str, ext: Extension) -> str:
        """Compile one file; return the object's path."""
        if source.endswith(".cu"):
            return self.compile_with_nvcc(source, ext)
        (target,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        return target

    def compile_with_nvcc(self, source: str, ext: Extension) -> str:
        """Compile one file; return the object's path."""
        target = Path(self.build_temp, source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn(
            [
                str(self.cuda_home / "bin" / "nvcc"),
                *COMPILE[:2],
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                *ARCHITECTURES,
                *(f"-D{name}={value}" for name, value in ext.define_macros),
                *(f"-I{folder}" for folder in ext.include_dirs),
                "-c",
                source,
                "-o",
                str(target),
            ]
        )
        return str(target)


choice = extension_choice()
if choice == "none":
    setup()
else:
    cuda_home = None if choice == "cpu" else find_cuda_home()
    if choice == "cuda" and cuda_home is None:
        raise SystemExit("BITFAST_EXTENSION=cuda, but no nvcc was found; set CUDA_HOME")
    if cuda_home is not None:
        BuildNative.cuda_home = cuda_home
    setup(
        ext_modules=extensions(cuda_home),
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
