"""``python -m bench.finetune_loading``: whether reading and resizing images keeps up with training on them.

Images a second of both alone, then of both together, and the part of that time in which a step waits.
The images are JPEG files of 500x400, made of scikit-image's photographs; the network is R50x1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitfast import BitConfig, BitForImageClassification, BitImageProcessor
from bitfast.finetuning.augmentation import normalized
from bitfast.finetuning.batches import Step, TrainingBatches
from bitfast.finetuning.dataset import Dataset, open_splits
from bitfast.finetuning.processes import Processes
from bitfast.finetuning.recipe import Recipe, choose_recipe
from bitfast.finetuning.training import Trainer

from .photographs import jpeg_files
from .rows import machine
from .tables import table

FILES = 128
R50X1 = BitConfig(id2label={0: "class 0", 1: "class 1"})


def write_photographs(folder: Path, count: int) -> Path:
    """Write JPEG files of photographs, in turns into the folders of two classes."""
    for i, content in enumerate(jpeg_files(count)):
        path = folder / f"class {i % 2}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class Measurement:
    """A network, images to train it on, and how long both take."""

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        config: BitConfig,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.dataset, self.recipe, self.device = dataset, recipe, device
        model = BitForImageClassification(config).to(device).train()
        self.processor = recipe.processor(BitImageProcessor())
        processes = Processes(torch.device(device))
        self.trainer = Trainer(model, recipe, self.processor, dtype, processes)

    def batches(self, workers: int, micro_batch: int) -> TrainingBatches:
        return TrainingBatches(
            self.dataset, self.recipe, resample=self.processor.resample, seed=0, workers=workers,
            micro_batch=micro_batch, pin_memory=self.device == "cuda",
        )  # fmt: skip

    def rate_of_loading(self, workers: int, micro_batch: int) -> float:
        """Return images a second, from the second step on; they go to the device and are normalized."""
        began = 0.0
        for step in self.batches(workers, micro_batch):
            for batch in step.micro_batches:
                normalized(batch.images, self.processor, self.device, torch.float32)
            self.wait()
            began = began or time.perf_counter()
        return self.rate_since(began)

    def rate_of_training(self, micro_batch: int) -> float:
        """Return images a second, from the second step on, of images that are there already."""
        batches = [
            batch for step in itertools.islice(self.batches(0, micro_batch), 1) for batch in step.micro_batches
        ]  # fmt: skip
        began = 0.0
        for number in range(self.recipe.steps):
            self.train(number, batches)
            began = began or time.perf_counter()
        return self.rate_since(began)

    def both(self, workers: int, micro_batch: int) -> tuple[float, float]:
        """Return images a second and the part of the time that is spent waiting, from the second step on."""
        batches = self.batches(workers, micro_batch)
        began = waited = 0.0
        for step in batches:
            self.train(step.number, step.micro_batches)
            if not began:
                began, waited = time.perf_counter(), batches.waited
        rate = self.rate_since(began)
        seconds = (self.recipe.steps - 1) * self.recipe.batch_size / rate
        return rate, (batches.waited - waited) / seconds

    def train(self, number: int, batches: Any) -> None:
        step: Step = Step(number, self.recipe.batch_size, None, iter(batches))
        self.trainer.gradients(step)
        self.trainer.update(number)
        self.wait()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def rate_since(self, began: float) -> float:
        return (self.recipe.steps - 1) * self.recipe.batch_size / (time.perf_counter() - began)


def measure(
    measurement: Measurement, workers: Sequence[int], micro_batch: int
) -> list[dict[str, Any]]:
    training = measurement.rate_of_training(micro_batch)
    rows = []
    for count in workers:
        loading = measurement.rate_of_loading(count, micro_batch)
        together, waiting = measurement.both(count, micro_batch)
        rows.append(
            {"workers": count, "loading": loading, "training": training, "together": together,
             "waiting": waiting}
        )  # fmt: skip
    return rows


def markdown(found: dict[str, Any]) -> str:
    heads = ["workers", "loading alone", "training alone", "both together", "time spent waiting"]
    cells = [
        (row["workers"], *(f"{row[key]:.3g}" for key in ("loading", "training", "together")),
         f"{100 * row['waiting']:.1f} %")
        for row in found["rows"]
    ]  # fmt: skip
    what = f"{found['device']}, {found['dtype']}, {found['resize']} to {found['crop']} pixels"
    load = found["machine"]["load"]
    return "\n".join(
        [f"Images a second; {what}; load {load} before", "", *table(heads, cells, "rrrrr")]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--steps", type=int, default=6, metavar="N", help="the first is not counted"
    )
    parser.add_argument("--batch-size", type=int, default=512 if has_gpu else 8, metavar="N")
    parser.add_argument("--micro-batch", type=int, default=64 if has_gpu else 4, metavar="N")
    parser.add_argument("--crop", type=int, metavar="N", help="default: the recipe's, 384")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here")
    options = parser.parse_args(arguments)
    about = {"machine": machine(options.device), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        photographs = write_photographs(Path(folder), FILES)
        dataset = open_splits(photographs, valid_fraction=0).training
        overrides = {
            "steps": options.steps, "batch_size": options.batch_size, "crop": options.crop,
        }  # fmt: skip
        recipe, _ = choose_recipe(len(dataset), dataset.sizes, overrides)
        dtype = getattr(torch, options.dtype)
        measurement = Measurement(dataset, recipe, R50X1, options.device, dtype)
        rows = measure(measurement, options.workers, options.micro_batch)
    found = {
        **about,
        **{name: getattr(options, name) for name in ("device", "dtype", "steps", "batch_size", "micro_batch")},
        "resize": recipe.resize,
        "crop": recipe.crop,
        "rows": rows,
    }  # fmt: skip
    print(markdown(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
