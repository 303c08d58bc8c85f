"""A contestant's run of a whole model: its weights, the check against float64, the time, the memory.

Models have random weights, the same for bitfast and transformers. Before a time is taken, logits and
gradients are compared with float64: bitfast may be off by twice what transformers is in the same dtype.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpu_timing import (
    SMOKE_SLACK,
    Sample,
    Session,
    WrongResultError,
    measure,
    relative_error,
    synchronize,
)
from .torchvision_import import import_torchvision

NETWORKS: dict[str, dict[str, Any]] = {
    "R50x1": {},
    "R101x3": {
        "embedding_size": 192,
        "hidden_sizes": [768, 1536, 3072, 6144],
        "depths": [3, 4, 23, 3],
    },
    "tiny": {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2},
}
THEIRS = "transformers eager"
CHECKED_BATCH = 2
ROUNDINGS = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-25}
FIRST_BOUND = 0.1
"""Relative error from float64 above which no 16-bit result is right; for the models that set the bound."""


@dataclass(frozen=True)
class Setting:
    """What is run on which model: "inference" or "training", in a dtype or under bfloat16 autocast."""

    network: str
    batch: int
    mode: str
    precision: str

    @property
    def case(self) -> str:
        """The setting in one line."""
        return f"{self.network} {self.mode} batch {self.batch} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return torch.float32 if self.precision == "autocast" else getattr(torch, self.precision)

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """Within it the model runs."""
        if self.precision == "autocast":
            return torch.autocast(device, dtype=torch.bfloat16)
        return nullcontext()


# ---- the models -----------------------------------------------------------------------------------


class Weights:
    """Random weights for each network, made once, on the device: some have 400 million."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.by_network: dict[str, dict[str, Tensor]] = {}

    def of(self, network: str) -> dict[str, Tensor]:
        """Return the state dict of a network."""
        if network not in self.by_network:
            torch.manual_seed(0)
            with torch.device(self.device):
                model = our_model(network)
            for module in model.modules():
                if isinstance(module, nn.GroupNorm):  # ones and zeros would hide mistakes
                    nn.init.uniform_(module.weight, 0.7, 1.3)
                    nn.init.normal_(module.bias, 0.0, 0.2)
            self.by_network[network] = model.state_dict()
        return self.by_network[network]


@cache
def weights_on(device: str) -> Weights:
    """Return the one collection of weights on a device."""
    return Weights(device)


def our_model(network: str) -> nn.Module:
    """Return bitfast's model."""
    from bitfast import BitConfig, BitForImageClassification

    return BitForImageClassification(BitConfig(num_labels=1000, **NETWORKS[network]))


def their_model(network: str) -> nn.Module:
    """Return transformers' model."""
    import_torchvision()
    import transformers

    config = transformers.BitConfig(num_labels=1000, **NETWORKS[network])
    return transformers.BitForImageClassification(config)


def placed(session: Session, make: Callable[[str], nn.Module], setting: Setting) -> nn.Module:
    """Return a model with the common weights on the device, ready for the setting."""
    with torch.device(session.device):
        model = make(setting.network)
    model.load_state_dict(weights_on(session.device).of(setting.network))
    model = model.to(session.device, setting.dtype)
    return model.train(setting.mode == "training")


def images(session: Session, setting: Setting, batch: int | None = None) -> Tensor:
    """Draw a batch of images as users have them: NCHW."""
    size = 16 if session.is_smoke else 224
    x = torch.randn(batch or setting.batch, 3, size, size, device=session.device)
    return x.to(setting.dtype)


def inference(model: Any, x: Tensor) -> Tensor:
    """Return the logits of a model of any library."""
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the model as a function from images to logits."""
    return lambda x: inference(model, x)


def train_step(model: Any, x: Tensor, labels: Tensor, optimizer: Any, setting: Setting) -> Tensor:
    """One step of plain SGD; returns the loss."""
    with setting.autocast(x.device.type):
        loss = F.cross_entropy(inference(model, x).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


# ---- checks ---------------------------------------------------------------------------------------


def outcome(model: nn.Module, x: Tensor, setting: Setting) -> Tensor:
    """Return what is compared: the logits, or in training all gradients."""
    if setting.mode == "inference":
        with torch.no_grad():
            return inference(model, x)
    model.zero_grad(set_to_none=True)
    with setting.autocast(x.device.type):
        logits = inference(model, x)
    labels = torch.arange(x.shape[0], device=x.device)
    F.cross_entropy(logits.float() if x.dtype != torch.float64 else logits, labels).backward()
    gradients = [p.grad.flatten().to(x.dtype) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)


class Checks:
    """Errors from float64, by setting, each computed once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.theirs: dict[str, float | None] = {}
        self.exact: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}

    def exact_outcome(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Return images and what the reference backend makes of them in float64."""
        from bitfast.backends import use_backend

        key = (setting.network, setting.mode, setting.precision)
        if key not in self.exact:
            self.exact.clear()
            x = images(self.session, setting, CHECKED_BATCH)
            model = placed(self.session, our_model, setting).double()
            with use_backend("reference"):
                exact = Setting(setting.network, setting.batch, setting.mode, "float64")
                self.exact[key] = x, outcome(model, x.double(), exact)
        return self.exact[key]

    def error(self, model: nn.Module, setting: Setting) -> float:
        """Return a model's error."""
        x, expected = self.exact_outcome(setting)
        return relative_error(outcome(model, x, setting), expected)

    def bound(self, setting: Setting) -> float:
        """Return what error is allowed: twice that of transformers, where it is installed."""
        key = f"{setting.network} {setting.mode} {setting.precision}"
        if key not in self.theirs:
            try:
                self.theirs[key] = self.error(placed(self.session, their_model, setting), setting)
            except ImportError:
                self.theirs[key] = None
            free()
        error = self.theirs[key]
        if self.session.is_smoke and setting.precision == "autocast":
            return 2.0  # in a tiny model one ReLU that flips moves the gradient by half its length
        if error is None:
            return FIRST_BOUND
        return 2 * error + ROUNDINGS[setting.dtype] + SMOKE_SLACK * self.session.is_smoke

    def passed(self, model: nn.Module, setting: Setting, contestant: str) -> float:
        """Return the error.

        Raises:
            WrongResultError: it is larger than allowed.
        """
        bound = self.bound(setting) if contestant.startswith("bitfast") else 1.0
        error = self.error(model, setting)
        if not error <= bound:
            raise WrongResultError(f"error {error:.2e} > {bound:.2e}")
        return error


# ---- times ----------------------------------------------------------------------------------------


def free() -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def race(
    session: Session,
    checks: Checks | None,
    setting: Setting,
    contestant: str,
    make: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """Check a contestant, time it, write its row.

    Args:
        session: Where.
        checks: None for networks that are another function altogether.
        setting: What.
        contestant: Its name.
        make: Returns the model, on the device.
        wrap: Returns what is called instead, such as the compiled model.
        layout: Of the images.
    """
    torch._dynamo.reset()
    if checks is not None:
        checks.bound(setting)  # now, so that its memory is not taken for the contestant's
        checks.exact_outcome(setting)
    free()
    with session.ours():
        facts, sample = prepared_and_timed(session, checks, setting, contestant, make, wrap, layout)
    free()
    session.add(
        setting.case,
        contestant,
        **sample._asdict(),
        **facts,
        images_per_second=setting.batch / sample.seconds,
        is_baseline=contestant == THEIRS,
    )


def prepared_and_timed(
    session: Session,
    checks: Checks | None,
    setting: Setting,
    contestant: str,
    make: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], Any],
    layout: torch.memory_format,
) -> tuple[dict[str, Any], Sample]:
    """Do the work of :func:`race`; what it held is free when it returns."""
    on_gpu = session.device == "cuda"
    facts: dict[str, Any] = {"batch": setting.batch, "network": setting.network}
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = make()
    called = wrap(model)
    x = images(session, setting).contiguous(memory_format=layout)
    step = step_of(called, model, x, setting)
    synchronize(session.device)
    start = time.perf_counter()
    step()
    synchronize(session.device)
    facts["first_seconds"] = time.perf_counter() - start
    if checks is not None:
        if setting.mode == "training":  # the step has changed them
            model.load_state_dict(weights_on(session.device).of(setting.network))
        facts["check"] = checks.passed(called, setting, contestant)
    if on_gpu:
        free()
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0 if session.is_smoke else (0.7 if setting.mode == "inference" else 1.2)
    sample = measure([step], session.device, seconds, capture=False)
    if on_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return facts, sample


def step_of(called: Any, model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], Tensor]:
    """Return what is timed."""
    if setting.mode == "training":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        labels = torch.arange(setting.batch, device=x.device) % 10
        return lambda: train_step(called, x, labels, optimizer, setting)

    def infer() -> Tensor:
        with torch.no_grad(), setting.autocast(x.device.type):
            return inference(called, x)

    return infer


class FixedBatch:
    """A model that was compiled or captured for one batch size, the first that it sees.

    Other batches, as checks have them, are filled up to it, or run image by image.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        self.call, self.model = call, model
        self.batch = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits."""
        given = x.shape[0]
        self.batch = self.batch or given
        if given == self.batch:
            return self.call(x)
        if given < self.batch:
            x = torch.cat([x, x[:1].expand(self.batch - given, -1, -1, -1)])
            return self.call(x)[:given]
        # Cloned: a graph writes its next result over this one.
        return torch.cat([self.call(piece).clone() for piece in x.split(self.batch)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the model's."""
        self.model.zero_grad(set_to_none=set_to_none)

    def parameters(self) -> Iterator[nn.Parameter]:
        """As the model's."""
        return self.model.parameters()


class Graphed:
    """A model's evaluation in a CUDA graph, captured in the first call; the images are copied into it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits; the next call overwrites them."""
        if self.graph is None:
            self.capture(x)
            assert self.graph is not None
        self.x.copy_(x)
        self.graph.replay()
        return self.logits

    @torch.no_grad()
    def capture(self, x: Tensor) -> None:
        """Capture the forward pass, after warming up on the stream of the capture."""
        self.x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                inference(self.model, self.x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = inference(self.model, self.x)
        self.graph = graph
