"""A contestant of a model case: constructed, called, timed; in a process of its own, which does nothing else.

Run as a script, so that nothing is loaded but what the contestant needs: its memory is measured. The process
that starts it (``workers.py``) sends a description, a dict, through a connection whose number is the argument.
What is answered first: the seconds from constructing (what is imported has been) to the first result, and
the peak of the memory after the second. From then on, each number that comes is answered by the seconds that so
many calls took, and "kernels" by samples of the GPU's share. None ends it.

What a description says, by key: ``package`` is whose code computes ("transformers", "timm", "torchvision",
"bitfast", "onnxruntime", "openvino"; "case" for any case of the benchmark); ``dtype`` and ``device``;
``form`` is "eager", "compiled" (with ``mode``), "autocast", "compiled autocast", "accelerated", "captured" or
"captured autocast";
``fused`` says which convolutions of bitfast normalize what they read on a GPU: those that do so by default
(""), those that the "table" of plans names, or all that have a kernel ("everywhere"); ``folder`` holds the
checkpoint, ``onnx`` the same network for other runtimes, ``input`` the images and ``grad`` the gradient of the
output, for training; of the first ``checked`` images the results go to ``output``.
"""

from __future__ import annotations

import resource
import sys
import time
import timeit
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Work = dict[str, Any]
Call = Callable[[], Any]


class Loaded(NamedTuple):
    """What makes a model of an imported package and returns what runs it; and its results in float32."""

    construct: Callable[[], Call]
    array: Callable[[Any], np.ndarray]


class First(NamedTuple):
    """A contestant after its first results; see ``Running`` in ``cases.py``."""

    results: list[np.ndarray]
    time: Callable[[int], float]
    kernels: Callable[[], list[float]] | None = None
    first_result: float | None = None
    peak_memory: int | None = None


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    work = connection.recv()
    try:
        first = begin_case(work) if work["package"] == "case" else begin(work)
        np.savez(work["output"], *first.results)
        first.results.clear()
        connection.send({"first_result": first.first_result, "peak_memory": first.peak_memory})
        while (wanted := connection.recv()) is not None:
            if wanted == "kernels" and first.kernels:
                connection.send({"seconds": first.kernels()})
            else:
                connection.send({"seconds": first.time(wanted)})
    except EOFError:  # whoever asks has gone
        return
    except Exception as error:
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {error}"})


def begin(work: Work) -> First:
    loaded = LOADERS[work["package"]](work)
    before = memory_in_use(work)
    with fusing(work["fused"]):
        start = clock()
        call = loaded.construct()
        result = call()
        first_result = clock() - start
        result = call()
        clock()
    peak = peak_memory(work) - before
    time_calls = fusing(work["fused"])(timeit.Timer(call, timer=clock).timeit)
    return First([loaded.array(result)], time_calls, None, first_result, peak)


def begin_case(work: Work) -> First:
    """Begin a contestant of any case, with the bitfast that this process finds first."""
    import bitfast  # noqa: F401 - before the path leads to the checkout whose benchmark is run

    sys.path.insert(0, work["root"])
    from bench import registry

    found = registry.cases(work["device"], [work["threads"]])
    (case,) = (case for case in found if case.title == work["case"])
    stack = ExitStack()  # all that it holds goes with the process
    problem = stack.enter_context(registry.opened(case))
    (contestant,) = (each for each in problem.contestants if each.name == work["contestant"])
    running = contestant.begin(stack)
    results = [result.detach().float().cpu().numpy() for result in running.results]
    return First(results, running.time, running.kernels)


def clock() -> float:
    """Return the time in seconds, when a GPU in use has done what it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_in_use(work: Work) -> int:
    """Return the GPU's memory that others have in use already, and begin to watch its peak; 0 on a CPU."""
    if work["device"] == "cpu":
        return 0
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(work: Work) -> int:
    """Return the most memory, in bytes, that was in use on a GPU, or resident of this process."""
    if work["device"] == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    # Other systems, and getrusage on Linux too, may count what the process that started this one had.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- whatever computes with torch -----------------------------------------------------------------


def load_torch(work: Work) -> Loaded:
    import torch

    if work["threads"]:
        torch.set_num_threads(work["threads"])
    if work["package"] != "bitfast":
        sys.path.append(str(Path(__file__).parent))
        from torchvision_import import import_torchvision

        import_torchvision()
    package = __import__(work["package"])
    if work["form"] == "accelerated":
        import bitfast
    stored = getattr(torch, "float32" if "autocast" in work["form"] else work["dtype"])
    if "compiled" in work["form"]:
        torch._dynamo.reset()

    x = np.load(work["input"])

    def construct() -> Call:
        if work["package"] == "timm":
            model = timm_model(package, work["folder"])
        elif work["package"] == "torchvision":
            model = package.models.resnet50(weights=None)
        else:
            model_class = getattr(package, work["architecture"])
            model = model_class.from_pretrained(work["folder"], dtype=stored)
        model = model.to(work["device"], stored)
        images = torch.from_numpy(x).to(work["device"], stored)
        if work["is_channels_last"]:
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        if work["form"] == "accelerated":
            bitfast.accelerate(model)
        return call_of(model.train(work["is_training"]), images, work)

    def joined(tensors: list[Any]) -> np.ndarray:
        if not work["is_training"]:
            tensors = [tensor[: work["checked"]] for tensor in tensors]
        return torch.cat([t.detach().float().flatten() for t in tensors]).cpu().numpy()

    return Loaded(construct, joined)


def timm_model(timm: Any, folder: str) -> Any:
    """Return timm's R50x1 with the weights of a checkpoint of transformers."""
    from safetensors.torch import load_file

    names = {
        "bit.embedder.convolution": "stem.conv", "bit.encoder.stages": "stages", "layers": "blocks",
        "bit.norm": "norm", "classifier.1": "head.fc",
    }  # fmt: skip
    model = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
    state = {}
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        state[name] = tensor[:, :, None, None] if name == "head.fc.weight" else tensor
    model.load_state_dict(state)
    return model


def call_of(model: Any, images: Any, work: Work) -> Call:
    """Return the forward pass, or the training step, whose results are the gradients of all parameters.

    On a GPU a step of SGD belongs to it, of length 0: the same work, and the weights stay what was checked.
    """
    import torch

    called = in_form(model, images, work)
    is_autocast = "autocast" in work["form"]
    dtype = getattr(torch, work["dtype"]) if is_autocast else None

    def forward() -> list[Any]:
        with torch.autocast(work["device"], dtype, is_autocast):
            return outputs_of(called(images))

    if not work["is_training"]:
        return torch.no_grad()(forward)
    grad = torch.from_numpy(np.load(work["grad"])).to(images.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0) if work["device"] == "cuda" else None

    def step() -> list[Any]:
        for parameter in parameters:
            parameter.grad = None
        (output,) = forward()
        output.backward(grad.to(output.dtype))
        if optimizer is not None:
            optimizer.step()
        return [parameter.grad for parameter in parameters]

    return captured(step) if "captured" in work["form"] else step


def captured(step: Call) -> Call:
    """Return what replays a step that is recorded as a CUDA graph."""
    import torch

    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def in_form(model: Any, images: Any, work: Work) -> Any:
    """Return what is called instead of the model."""
    if "compiled" in work["form"]:
        import torch

        if work["device"] == "cpu":
            from torch._inductor import config

            config.freezing = True
            return torch.compile(model)
        return torch.compile(model, mode=work["mode"], dynamic=False)
    if work["form"] == "captured" and not work["is_training"]:
        import bitfast

        bitfast.capture(model, images)
    return model


@contextmanager
def fusing(convolutions: str) -> Iterator[None]:
    """Let plans fuse the convolutions that ``fused`` in a description names, until the block ends."""
    if not convolutions:
        yield
        return
    from bitfast import backends

    if convolutions == "everywhere":
        with backends.use_backend(norm_convolution="native"):
            yield
        return
    kernel = "norm_convolution", "native", "cuda"
    backends.enable_kernel(*kernel)
    try:
        yield
    finally:
        backends.disable_kernel(*kernel)


def outputs_of(result: Any) -> list[Any]:
    """Return the logits of a classifier, a depth, or the feature maps of a backbone."""
    if not isinstance(result, dict):
        return [result]
    single = [result[name] for name in ("logits", "predicted_depth") if name in result]
    return single or list(result["feature_maps"])


# ---- other runtimes -----------------------------------------------------------------------------


def load_onnxruntime(work: Work) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work["threads"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads would wait for work on cores that by then are the next contestant's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    x = np.load(work["input"])

    def construct() -> Call:
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(work["onnx"], options, providers=providers)
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: x})

    return Loaded(construct, joined_arrays)


def load_openvino(work: Work) -> Loaded:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[work["dtype"]],
        "INFERENCE_NUM_THREADS": work["threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    x = np.load(work["input"])

    def construct() -> Call:
        compiled = openvino.Core().compile_model(work["onnx"], "CPU", hints)
        request = compiled.create_infer_request()

        def call() -> list[np.ndarray]:
            results = request.infer([x], share_inputs=True, share_outputs=True)
            return [results[i] for i in range(len(compiled.outputs))]

        return call

    return Loaded(construct, joined_arrays)


def joined_arrays(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


LOADERS: dict[str, Callable[[Work], Loaded]] = {
    **dict.fromkeys(("transformers", "timm", "torchvision", "bitfast"), load_torch),
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


if __name__ == "__main__":
    main()
