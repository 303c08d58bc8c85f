"""The cases that are about whole models, and who takes part in each.

On a CPU each contestant has a process of its own. On a GPU all share this one: memory can be told apart there,
and to start a process costs more than most measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import contestant as own_process
from . import peers
from .accuracy import GRADIENT_LIMITS, LIMITS, Float64Judge, Verdict, overall_error
from .cases import Case, Contestant, NotInstalledError, Problem, Running
from .norm_convolutions import require_kernels
from .torchvision_import import import_torchvision
from .workers import Work, begin_process


@dataclass(frozen=True)
class Entry:
    """A contestant before its case is known; ``contestant.py`` says what the fields mean."""

    name: str
    package: str
    dtype: str = "float32"
    form: str = "eager"
    mode: str = "default"
    is_channels_last: bool = False
    fused: str = ""


BASELINE = Entry("transformers", "transformers")
"""Every ratio on a CPU is to its time, whatever the dtype."""
EVERYBODY = (
    BASELINE,
    Entry("transformers compiled", "transformers", "float32", "compiled"),
    Entry("ONNX Runtime", "onnxruntime"),
    Entry("OpenVINO", "openvino"),
    Entry("bitfast", "bitfast"),
    Entry("bitfast compiled", "bitfast", "float32", "compiled"),
    Entry("transformers bfloat16", "transformers", "bfloat16"),
    Entry("transformers bfloat16 compiled", "transformers", "bfloat16", "compiled"),
    Entry("OpenVINO bfloat16", "openvino", "bfloat16"),
    Entry("bitfast bfloat16", "bitfast", "bfloat16"),
    Entry("bitfast bfloat16 compiled", "bitfast", "bfloat16", "compiled"),
    Entry("bitfast autocast", "bitfast", "bfloat16", "autocast"),
)
"""By dtype, each beginning with its yardstick. ONNX Runtime has no bfloat16 on the CPU."""
EAGER = tuple(entry for entry in EVERYBODY if entry.form != "compiled")
IN_PLACE = tuple(
    Entry(name + suffix, package, dtype, form)
    for dtype, suffix in (("float32", ""), ("bfloat16", " bfloat16"))
    for name, package, form in (
        ("transformers", "transformers", "eager"),
        ("timm", "timm", "eager"),
        ("bitfast", "bitfast", "eager"),
        ("bitfast in transformers", "transformers", "accelerated"),
        ("bitfast in timm", "timm", "accelerated"),
    )
)
"""What ``bitfast.accelerate`` makes of a model, beside bitfast's own."""
IN_TRANSFORMERS = tuple(e for e in IN_PLACE if e.package == "transformers" and e.dtype == "float32")
"""In bfloat16 a DPT of random weights magnifies roundings to a tenth of the result, whoever computes it."""
TRAINING = tuple(
    Entry(package + words, package, dtype, form)
    for dtype, words, form in (
        ("float32", "", "eager"),
        ("float32", " compiled", "compiled"),
        ("bfloat16", " autocast", "autocast"),
        ("bfloat16", " autocast compiled", "compiled autocast"),
    )
    for package in ("transformers", "bitfast")
)

R50X1: dict[str, Any] = {"num_labels": 1000}
R101X1: dict[str, Any] = {"num_labels": 1000, "depths": [3, 4, 23, 3]}
R101X3 = {**R101X1, "embedding_size": 192, "hidden_sizes": [768, 1536, 3072, 6144]}
SAME: dict[str, Any] = {**R50X1, "global_padding": "same"}
HYBRID: dict[str, Any] = {
    "layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True,
    "depths": [3, 4, 9], "hidden_sizes": [256, 512, 1024, 2048],
    "out_features": ["stage1", "stage2", "stage3"],
}  # fmt: skip
"""The backbone of DPT-hybrid."""


@dataclass(frozen=True)
class Network:
    """A network and its input.

    Attributes:
        settings: What differs from the default configuration.
        batch, height, width: Of the images.
        architecture: The class of the model.
        is_training: Forward and backward pass instead of the forward pass alone.
        checked: Of how many images, from the first, results are compared with float64.
        device: "cpu" or "cuda".
        threads: Of the CPU; 0 on a GPU.
    """

    settings: dict[str, Any]
    batch: int
    height: int = 224
    width: int = 224
    architecture: str = "BitForImageClassification"
    is_training: bool = False
    checked: int = 8
    device: str = "cpu"
    threads: int = 1

    def case(self, name: str, entries: Sequence[Entry], is_quick: bool = False) -> Case:
        return Case(
            "model", "training" if self.is_training else "inference", name, entries[0].dtype,
            partial(opened, self, entries), self.device, self.threads,
            is_training=self.is_training, is_quick=is_quick,
        )  # fmt: skip


def cases(device: str, thread_counts: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of a device."""
    if device == "cuda":
        yield from gpu_cases()
        return
    for threads in thread_counts:
        on: dict[str, Any] = {"threads": threads}
        for batch in (1, 8):
            r50 = Network(R50X1, batch, **on)
            yield r50.case(f"R50x1 224x224 batch {batch}", EVERYBODY, is_quick=batch == 1)
        yield Network(R101X1, 1, 448, 448, **on).case("R101x1 448x448 batch 1", EAGER)
        yield Network(SAME, 1, 480, 640, **on).case('R50x1 480x640 batch 1, "same" padding', EAGER)
        hybrid = Network(HYBRID, 1, 384, 384, "BitBackbone", **on)
        yield hybrid.case("DPT-hybrid backbone 384x384 batch 1", EAGER)
        yield Network(R50X1, 8, is_training=True, **on).case("R50x1 224x224 batch 8", TRAINING)
        for batch in (1, 8):
            name = f"in place, R50x1 224x224 batch {batch}"
            yield Network(R50X1, batch, **on).case(name, IN_PLACE)
        hybrid = Network(HYBRID, 1, 384, 384, "DPTForDepthEstimation", **on)
        yield hybrid.case("in place, DPT-hybrid 384x384 batch 1", IN_TRANSFORMERS)


# ---- on a GPU -------------------------------------------------------------------------------------


def gpu_entries(dtype: str, *, is_training: bool = False) -> tuple[Entry, ...]:
    """Return who takes part where nothing must be compiled; ``dtype`` may be "autocast"."""
    dtype, form = ("bfloat16", "autocast") if dtype == "autocast" else (dtype, "eager")
    theirs, ours = (Entry(p, p, dtype, form) for p in ("transformers", "bitfast"))
    if is_training:
        form = "captured" if form == "eager" else f"captured {form}"
        return theirs, ours, Entry("bitfast, CUDA graph", "bitfast", dtype, form)
    in_last = Entry("transformers channels_last", "transformers", dtype, is_channels_last=True)
    return theirs, in_last, ours, Entry("bitfast, CUDA graph", "bitfast", dtype, "captured")


def compiled(package: str, name: str, mode: str = "default") -> Entry:
    """Return a contestant that is compiled, in bfloat16."""
    return Entry(name, package, "bfloat16", "compiled", mode, name.endswith("channels_last"))


COMPILED = tuple(
    compiled(package, f"{package} compiled") for package in ("bitfast", "transformers")
)
RESNET = compiled("torchvision", "torchvision ResNet-50 compiled, channels_last")
SAME_SIZE = (compiled("timm", "timm compiled, channels_last"), RESNET)
"""Not BiT's function in torchvision, but of its size: the bar to pass."""
GPU_NETWORKS = {"R50x1": R50X1, "R101x3": R101X3}
GPU_ROWS = (
    ("R50x1", 128, "bfloat16", False), ("R50x1", 1, "bfloat16", False), ("R50x1", 8, "bfloat16", False),
    ("R50x1", 128, "autocast", True), ("R50x1", 128, "bfloat16", True), ("R101x3", 16, "bfloat16", False),
    ("R50x1", 128, "float16", False), ("R50x1", 1, "float16", False), ("R101x3", 16, "autocast", True),
    ("R50x1", 8, "float16", False), ("R101x3", 16, "float16", False), ("R101x3", 16, "bfloat16", True),
)  # fmt: skip
"""Network, batch, dtype, whether it is trained: the most telling first."""


def gpu_cases() -> Iterator[Case]:
    """Yield the cases of a GPU; last those of what must be compiled, which takes about a minute each."""
    for name, batch, dtype, is_training in GPU_ROWS:
        entries = gpu_entries(dtype, is_training=is_training)
        is_quick = batch == 128 and dtype != "float16"
        yield gpu_case(name, batch, dtype, entries, is_training=is_training, is_quick=is_quick)
    ours_uncompiled = gpu_entries("autocast", is_training=True)[1]
    in_autocast = (
        ours_uncompiled,
        *(replace(entry, form="compiled autocast") for entry in (*COMPILED, RESNET)),
    )
    rows = [
        (128, "bfloat16", (*COMPILED, *SAME_SIZE), "compiled"),
        (1, "bfloat16", COMPILED, "compiled"),
        (128, "autocast", in_autocast, "compiled"),
    ]
    for batch, mode in ((128, "max-autotune-no-cudagraphs"), (1, "max-autotune")):
        tuned = compiled("transformers", f"transformers compiled ({mode})", mode)
        rows.append((batch, "bfloat16", (tuned,), "autotuned"))
    for batch, dtype, compiled_entries, note in rows:
        entries = (gpu_entries(dtype)[0], *compiled_entries)
        is_training = dtype == "autocast"
        yield gpu_case("R50x1", batch, dtype, entries, f", {note}", is_training=is_training)


def gpu_case(
    name: str, batch: int, dtype: str, entries: Sequence[Entry], note: str = "",
    *, is_training: bool, is_quick: bool = False,
) -> Case:  # fmt: skip
    settings = GPU_NETWORKS[name]
    network = Network(settings, batch, is_training=is_training, checked=2, device="cuda", threads=0)
    return network.case(f"{name} 224x224 batch {batch} {dtype}{note}", entries, is_quick=is_quick)


FUSED = (
    Entry("transformers", "transformers", "bfloat16"),
    *(
        Entry("bitfast" + words + suffix, "bitfast", "bfloat16", form, fused=fused)
        for fused, words in (
            ("", ""),
            ("table", ", fused by the table"),
            ("everywhere", ", fused everywhere"),
        )
        for form, suffix in (("eager", ""), ("captured", ", CUDA graph"))
    ),
)
"""Plans without convolutions that normalize what they read; with them where the plan's table has them pay; with
them wherever there is a kernel."""
FUSED_BATCHES = (128, 1, 8)
FUSED_TIME_LIMIT = 75.0


def fused_cases() -> Iterator[Case]:
    """Yield the cases of :data:`FUSED`."""

    @contextmanager
    def opened_here(network: Network) -> Iterator[Problem]:
        require_kernels()
        with opened(network, FUSED) as problem:
            yield problem

    for batch in FUSED_BATCHES:
        case = gpu_case("R50x1", batch, "bfloat16", FUSED, ", norm_convolution", is_training=False)
        network = Network(R50X1, batch, checked=2, device="cuda", threads=0)
        yield replace(case, open=partial(opened_here, network), time_limit=FUSED_TIME_LIMIT)


# ---- what a case's contestants are given --------------------------------------------------------


@contextmanager
def opened(network: Network, entries: Sequence[Entry]) -> Iterator[Problem]:
    """Draw weights and images, write them, and compute the results in float64."""
    if peers.installed()["transformers"] is None:
        nobody = [Contestant(entry.name, entry.dtype, without_reference) for entry in entries]
        yield Problem(nobody, Float64Judge([]))
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        model = reference_model(network)
        model.save_pretrained(folder / "checkpoint")
        x = torch.randn(network.batch, 3, network.height, network.width)
        np.save(folder / "input.npy", x.numpy())
        onnx_problem = None
        if any(entry.package in ("onnxruntime", "openvino") for entry in entries):
            try:
                peers.export(model, x, folder / "model.onnx")
            except Exception as error:  # the others still run
                onnx_problem = f"no ONNX file: {type(error).__name__}: {error}"
        checked = x[: network.checked].double()
        model, checked = model.to(network.device), checked.to(network.device)
        with FlopCounterMode(display=False) as counter:
            oracle = exact_results(model, checked, folder, network)
        flops = counter.get_total_flops() * network.batch // len(checked)
        del model, checked
        limits = GRADIENT_LIMITS if network.is_training else LIMITS
        contestants = [contestant_of(entry, network, folder, onnx_problem) for entry in entries]
        yield Problem(contestants, ModelJudge(oracle, limits, overall_error), flops=flops)


class ModelJudge(Float64Judge):
    """Compares with float64 all that compute BiT's function, which torchvision's ResNet does not."""

    def __call__(self, name: str, dtype: str, results: Sequence[torch.Tensor]) -> Verdict:
        return Verdict(None, None) if "ResNet" in name else super().__call__(name, dtype, results)


def reference_model(network: Network) -> Any:
    """Return transformers' model, with random weights of which norms have some too."""
    import_torchvision()
    import transformers

    config = transformers.BitConfig(**network.settings)
    if network.architecture == "DPTForDepthEstimation":
        config = transformers.DPTConfig(
            is_hybrid=True, backbone_config=config, backbone_featmap_shape=[1, 1024, 24, 24],
            readout_type="project", neck_hidden_sizes=[256, 512, 768, 768],
            neck_ignore_stages=[0, 1], backbone_out_indices=[2, 5, 8, 11],
        )  # fmt: skip
    model = getattr(transformers, network.architecture)(config).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Draw the norms' weights and biases, which begin as ones and zeros: what leaves them out shows.

    A norm that ends a block's branch gets small weights, as in trained networks: with large ones the
    roundings of bfloat16 grow to a third of the result, and no error could be told from them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            ends_branch = name.endswith("norm3") and isinstance(module.activation, nn.Identity)
            nn.init.uniform_(module.weight, *((0.1, 0.3) if ends_branch else (0.5, 1.5)))
            nn.init.normal_(module.bias, std=0.1)


def exact_results(
    model: Any, x: torch.Tensor, folder: Path, network: Network
) -> list[torch.Tensor]:
    """Return the results in float64, flat: logits, feature maps, or the gradient of each parameter.

    The gradient of the output is drawn and written; it is 0 for images that are not compared.
    """
    model.double()
    results = own_process.outputs_of(model(x))
    if network.is_training:
        (output,) = results
        grad = torch.zeros(network.batch, *output.shape[1:])
        grad[: len(x)] = torch.randn(output.shape)
        np.save(folder / "grad.npy", grad.numpy())
        output.backward(grad[: len(x)].to(output))
        results = [p.grad for p in model.parameters() if p.grad is not None]
    return [result.detach().flatten().cpu() for result in results]


def contestant_of(
    entry: Entry, network: Network, folder: Path, onnx_problem: str | None
) -> Contestant:
    work = {
        **asdict(entry),
        **asdict(network),
        "folder": str(folder / "checkpoint"),
        "onnx": str(folder / "model.onnx"),
        "input": str(folder / "input.npy"),
        "grad": str(folder / "grad.npy"),
    }

    def begin(stack: ExitStack) -> Running:
        if entry.package != "bitfast" and peers.installed()[entry.package] is None:
            raise NotInstalledError(peers.how_to_install(entry.package))
        if entry.package in ("onnxruntime", "openvino") and onnx_problem is not None:
            raise RuntimeError(onnx_problem)
        if network.device == "cuda":
            return begin_here(work, stack)
        return begin_process(work, None, stack)

    is_compiled = "compiled" in entry.form
    return Contestant(entry.name, entry.dtype, begin, is_compiled=is_compiled, work=work)


def without_reference(stack: ExitStack) -> Running:
    how = peers.how_to_install("transformers")
    raise NotInstalledError(f"transformers, whose model is the reference: {how}")


def begin_here(work: Work, stack: ExitStack) -> Running:
    """Begin a contestant in this process."""
    first = own_process.begin(work)
    results = [torch.from_numpy(array) for array in first.results]
    return Running(results, first.time, lambda: [], first.first_result, first.peak_memory)
