"""One contestant of a model case, in a process of its own, which does nothing else.

Run as a script, so that nothing is loaded but what the contestant needs: its memory is measured. The process
that starts it sends a description (see ``Work`` in ``workers.py``) through a connection whose number is the
argument. What is answered first: the seconds from constructing (what is imported has been) to the first
result, and the peak of the memory after the second. From then on, each number that comes is answered by the
seconds that so many calls took. None ends it.
"""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Work = dict[str, Any]
Call = Callable[[], Any]
Build = Callable[[np.ndarray], Call]
"""Constructs the model and returns what runs it on these images."""
AsArray = Callable[[Any], np.ndarray]
"""Puts all numbers of a call's results into one array."""


def main() -> None:
    """Serve the connection."""
    connection = Connection(int(sys.argv[1]))
    work = connection.recv()
    try:
        x = np.load(work["input"])
        build, as_array = LOADERS[work["package"]](work)
        start = time.perf_counter()
        call = build(x)
        result = call()
        first_result = time.perf_counter() - start
        result = call()
        memory = peak_memory()
        np.save(work["output"], as_array(result))
        del result
        connection.send({"first_result": first_result, "peak_memory": memory})
        while (calls := connection.recv()) is not None:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            connection.send({"seconds": time.perf_counter() - start})
    except EOFError:  # whoever asks has gone
        return
    except Exception as error:
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {error}"})


def peak_memory() -> int:
    """Return the most memory, in bytes, that this process has had resident."""
    # Other systems, and getrusage on Linux too, may count what the process that started this one had.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- transformers, timm and bitfast -------------------------------------------------------------------


def load_torch(work: Work) -> tuple[Build, AsArray]:
    """Import what a model of transformers, timm or bitfast needs."""
    import torch

    torch.set_num_threads(work["threads"])
    if work["package"] != "bitfast":
        sys.path.append(str(Path(__file__).parent))
        from torchvision_import import import_torchvision

        import_torchvision()
    package = __import__(work["package"])
    if work["form"] == "accelerated":
        import bitfast
    dtype = "float32" if work["form"] == "autocast" else work["dtype"]

    def build(x: np.ndarray) -> Call:
        if work["package"] == "timm":
            model = timm_model(package, work["folder"]).to(getattr(torch, dtype))
        else:
            model_class = getattr(package, work["architecture"])
            model = model_class.from_pretrained(work["folder"], dtype=dtype)
        if work["form"] == "accelerated":
            bitfast.accelerate(model)
        images = torch.from_numpy(x).to(getattr(torch, dtype))
        if work["is_training"]:
            return training_call(model.train(), images, work)
        return inference_call(model.eval(), images, work["form"])

    return build, joined


def timm_model(timm: Any, folder: str) -> Any:
    """Return timm's R50x1 with the weights of a checkpoint of transformers."""
    from safetensors.torch import load_file

    names = {
        "bit.embedder.convolution": "stem.conv",
        "bit.encoder.stages": "stages",
        "layers": "blocks",
        "bit.norm": "norm",
        "classifier.1": "head.fc",
    }
    model = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
    state = {}
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        state[name] = tensor[:, :, None, None] if name == "head.fc.weight" else tensor
    model.load_state_dict(state)
    return model


def inference_call(model: Any, images: Any, form: str) -> Call:
    """Return the forward pass."""
    import torch

    called = model
    if form == "compiled":
        from torch._inductor import config

        config.freezing = True
        called = torch.compile(model)

    def call() -> list[Any]:
        with torch.no_grad():
            if form == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return outputs_of(called(images))
            return outputs_of(called(images))

    return call


def training_call(model: Any, images: Any, work: Work) -> Call:
    """Return the training step; its results are the gradients of all parameters."""
    import torch

    grad = torch.from_numpy(np.load(work["grad"])).to(images.dtype)
    parameters = list(model.parameters())

    def call() -> list[Any]:
        for parameter in parameters:
            parameter.grad = None
        (output,) = outputs_of(model(images))
        output.backward(grad)
        return [parameter.grad for parameter in parameters]

    return call


def outputs_of(result: Any) -> list[Any]:
    """Return the logits of a classifier, a depth, or the feature maps of a backbone."""
    if not isinstance(result, dict):
        return [result]
    for name in ("logits", "predicted_depth"):
        if name in result:
            return [result[name]]
    return list(result.feature_maps)


def joined(tensors: list[Any]) -> np.ndarray:
    """Return all numbers of some tensors in one array of float32."""
    import torch

    return torch.cat([t.detach().float().flatten() for t in tensors]).numpy()


# ---- other runtimes -----------------------------------------------------------------------------


def load_onnxruntime(work: Work) -> tuple[Build, AsArray]:
    """Import ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work["threads"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads would wait for work on cores that by then are the next contestant's.
    options.add_session_config_entry("session.force_spinning_stop", "1")

    def build(x: np.ndarray) -> Call:
        session = onnxruntime.InferenceSession(
            work["onnx"], options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: x})

    return build, joined_arrays


def load_openvino(work: Work) -> tuple[Build, AsArray]:
    """Import OpenVINO."""
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[work["dtype"]],
        "INFERENCE_NUM_THREADS": work["threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }

    def build(x: np.ndarray) -> Call:
        compiled = openvino.Core().compile_model(work["onnx"], "CPU", hints)
        request = compiled.create_infer_request()

        def call() -> list[np.ndarray]:
            results = request.infer([x], share_inputs=True, share_outputs=True)
            return [results[i] for i in range(len(compiled.outputs))]

        return call

    return build, joined_arrays


def joined_arrays(arrays: list[np.ndarray]) -> np.ndarray:
    """Return all numbers of some arrays in one."""
    return np.concatenate([array.ravel() for array in arrays])


LOADERS: dict[str, Callable[[Work], tuple[Build, AsArray]]] = {
    "transformers": load_torch,
    "timm": load_torch,
    "bitfast": load_torch,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


if __name__ == "__main__":
    main()
