"""``python -m bench.embedding``: images a second of ``bitfast embed``, beside transformers and the model alone.

R50x1 with random weights at 224x224, on a CPU, from JPEG files (photographs of scikit-image, 500x400) to
vectors: by bitfast's threads that decode ahead, and by a plain loop with transformers' slow processor and
model. What the model alone takes is the limit of the first. The vectors are compared before they are timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitfast import BitConfig, BitForImageClassification, BitImageProcessor

from .photographs import jpeg_files
from .torchvision_import import import_torchvision

BATCH = 32
CLOSE = 1e-4
"""What the vectors may differ by, of the largest number: random weights magnify roundings."""


def contestants(model: Path, photographs: Path) -> dict[str, Callable[[], np.ndarray]]:
    import_torchvision()
    import transformers

    from bitfast.embedding.command import default_threads
    from bitfast.embedding.embedder import Embedder
    from bitfast.embedding.inputs import find_items
    from bitfast.embedding.pipeline import embed_batches

    embedder = Embedder.load(str(model), torch.device("cpu"), "float32")
    processor = transformers.BitImageProcessor.from_pretrained(model)
    network = transformers.BitModel.from_pretrained(model)
    items = find_items([str(photographs)])
    parts = [items[begin : begin + BATCH] for begin in range(0, len(items), BATCH)]
    random = torch.randn(BATCH, 3, 224, 224)

    def ours() -> np.ndarray:
        dtype = np.dtype("float32")
        results = embed_batches(embedder, list(enumerate(parts)), default_threads(), dtype)
        return np.concatenate([result.vectors for result in results])

    def alone() -> np.ndarray:
        return np.concatenate([embedder.vectors(random[: len(part)]).numpy() for part in parts])

    @torch.inference_mode()
    def theirs() -> np.ndarray:
        vectors = []
        for part in parts:
            images = [Image.open(item.path) for item in part]
            inputs = processor(images, return_tensors="pt")
            vectors.append(network(**inputs).pooler_output.flatten(1).numpy())
        return np.concatenate(vectors)

    return {"bitfast embed": ours, "its model alone": alone, "transformers": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photographs, model = Path(folder, "photographs"), Path(folder, "model")
        photographs.mkdir()
        for number, content in enumerate(jpeg_files(arguments.images)):
            (photographs / f"{number:04}.jpg").write_bytes(content)
        torch.manual_seed(0)
        BitForImageClassification(BitConfig(num_labels=1000)).save_pretrained(model)
        BitImageProcessor().save_pretrained(model)
        found = contestants(model, photographs)
        ours, theirs = found["bitfast embed"](), found["transformers"]()
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        if not difference < CLOSE:
            raise SystemExit(f"the vectors differ by {difference:.1e} of the largest number")
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(arguments.rounds):
            for name, run in found.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    rates = {name: arguments.images / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:16} {rate:7.1f} images/s  {rate / rates['transformers']:.2f}x")


if __name__ == "__main__":
    main()
