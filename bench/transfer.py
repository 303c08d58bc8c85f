"""``python -m bench.transfer``: few-shot fine-tuning beside a linear probe and transformers' Trainer.

There is no network here that somebody has trained on millions of images. So a small BiT learns some of
scikit-learn's handwritten digits, 0 to 4, from scratch. It is then transferred, with a few images of each
class, to the other digits, and to photographs that scikit-image ships: faces, and what is none. All three
start with the same network and learn from the same images:

- fine-tuning: ``bitfast finetune``
- Trainer: transformers' Trainer and its BitForImageClassification and BitImageProcessor, with the same steps,
  batches, SGD and rate, which is constant
- probe: scikit-learn's LogisticRegression on the pooled features of the network as it is

No images are cropped or flipped at random, so that both have the same ones. Accuracy is that on images that
nobody has learned from.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitfast import BitForImageClassification, BitImageProcessor
from bitfast.digits import train as digits
from bitfast.finetuning.command import Options, finetune
from bitfast.finetuning.dataset import Dataset, open_splits

from .rows import machine
from .torchvision_import import import_torchvision

SIZE = 32
SHOTS = (1, 5, 10)
EPOCHS = 12
"""Of the network that is transferred."""


@dataclass(frozen=True)
class Budget:
    """What a network may learn with."""

    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.02


@dataclass(frozen=True)
class Row:
    """One way to transfer, once.

    Attributes:
        accuracy: From 0 to 1.
        seconds: Of training, by the clock; of the probe: of all it does.
        cpu_seconds: That the processor was busy with all of it: loading, training, measuring, and writing what
            ``bitfast finetune`` writes.
    """

    data: str
    shots: int
    seed: int
    way: str
    accuracy: float
    seconds: float
    cpu_seconds: float


# ---- data and the network to begin with ---------------------------------------------------------


def make_base(folder: Path, epochs: int = EPOCHS) -> Path:
    """Train a small network on the digits 0 to 4 and save it with its processor."""
    known = digits.load_digits()
    known = known.select([i for i, label in enumerate(known.labels) if label < 5])
    model, processor = digits.fit(known, epochs, seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def other_digits() -> list[tuple[Image.Image, str]]:
    data = digits.load_digits()
    return [
        (image, str(label))
        for image, label in zip(data.images, data.labels, strict=True)
        if label >= 5
    ]


def faces() -> list[tuple[Image.Image, str]]:
    """Photographs of 25x25 pixels: 100 faces of Labeled Faces in the Wild, and 100 others."""
    import skimage

    file = Path(skimage.__file__).parent / "data" / "lfw_subset.npy"
    pixels = (255 * np.load(file)).round().astype(np.uint8)
    names = ["face"] * 100 + ["other"] * 100
    return [(Image.fromarray(image), name) for image, name in zip(pixels, names, strict=True)]


DATA = {"digits 5 to 9": other_digits, "faces": faces}


def write_halves(pairs: Sequence[tuple[Image.Image, str]], folder: Path) -> tuple[Path, Path]:
    """Write every second image for learning, the others for measuring, into a folder for each class."""
    for number, (image, name) in enumerate(pairs):
        target = folder / ("train", "test")[number % 2] / name
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{number:05}.png")
    return folder / "train", folder / "test"


def few(train: Path, test: Path, shots: int, seed: int) -> tuple[Dataset, Dataset]:
    """Return the images that ``bitfast finetune --per-class`` learns from, and those to measure with."""
    splits = open_splits(train, valid=test, per_class=shots, seed=seed)
    return splits.training, splits.validation


# ---- three ways to transfer ---------------------------------------------------------------------


def fine_tune(
    base: Path, train: Path, test: Path, shots: int, seed: int, budget: Budget
) -> tuple[float, float]:
    """Transfer with ``bitfast finetune``; return accuracy and seconds of training."""
    with tempfile.TemporaryDirectory() as folder, silence():
        options = Options(
            train, Path(folder, "run"), str(base), valid=test, per_class=shots, seed=seed,
            overrides={
                "steps": budget.steps, "batch_size": budget.batch_size,
                "base_learning_rate": budget.learning_rate, "warmup_steps": 0, "decay_steps": (),
                "resize": SIZE, "crop": SIZE, "flip": False,
            },
            dtype="float32", device="cpu", workers=0, evaluate_every=budget.steps,
        )  # fmt: skip
        evaluation = finetune(options)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    assert evaluation is not None
    rates = [json.loads(line).get("images_per_second") for line in lines]
    return evaluation.measurement.accuracy, sum(budget.batch_size / rate for rate in rates if rate)


def probe(
    base: Path, train: Path, test: Path, shots: int, seed: int, budget: Budget
) -> tuple[float, float]:
    """Fit a linear classifier on the features of the network as it is, whatever the budget."""
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    model = BitForImageClassification.from_pretrained(base)
    processor = BitImageProcessor.from_pretrained(base)

    @torch.inference_mode()
    def features(data: Dataset) -> np.ndarray:
        images = [data.read(i) for i in range(len(data))]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        parts = [model.bit(part).pooler_output.flatten(1) for part in pixels.split(64)]
        return torch.cat(parts).numpy()

    training, held_out = few(train, test, shots, seed)
    classifier = LogisticRegression(max_iter=1000).fit(features(training), training.labels)
    seconds = time.perf_counter() - started
    return float(classifier.score(features(held_out), held_out.labels)), seconds


class _Prepared(torch.utils.data.Dataset):
    """What Trainer reads: images that transformers' processor prepares when they are asked for."""

    def __init__(self, data: Dataset, processor: Any, count: int) -> None:
        self.data, self.processor, self.count = data, processor, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index %= len(self.data)
        pixels = self.processor(self.data.read(index), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": int(self.data.labels[index])}


def trainer(
    base: Path, train: Path, test: Path, shots: int, seed: int, budget: Budget
) -> tuple[float, float]:
    """Transfer with transformers alone: the same network, images, steps, batches, optimizer and rate."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    training, held_out = few(train, test, shots, seed)
    classes = len(set(training.labels.tolist()))
    transformers.set_seed(seed)
    model = transformers.BitForImageClassification.from_pretrained(
        base, num_labels=classes, ignore_mismatched_sizes=True
    )
    processor = transformers.BitImageProcessor.from_pretrained(base)
    with tempfile.TemporaryDirectory() as folder, silence():
        arguments = transformers.TrainingArguments(
            folder, max_steps=budget.steps, per_device_train_batch_size=budget.batch_size,
            per_device_eval_batch_size=64, max_grad_norm=0.0, seed=seed, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        # So many that a batch is never short, as it would be at the end of each round of a few images.
        count = len(training) * budget.batch_size
        # Handed over, since optim="sgd" would have no momentum.
        sgd = torch.optim.SGD(model.parameters(), budget.learning_rate, momentum=0.9)
        run = transformers.Trainer(
            model, arguments, train_dataset=_Prepared(training, processor, count),
            optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)),
        )  # fmt: skip
        seconds = run.train().metrics["train_runtime"]
        found = run.predict(_Prepared(held_out, processor, len(held_out)))
    return float((found.predictions.argmax(1) == held_out.labels).mean()), seconds


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


WAYS = {"fine-tuning": fine_tune, "Trainer": trainer, "probe": probe}


# ---- the comparison -----------------------------------------------------------------------------


def compare(base: Path, budget: Budget, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield each way to transfer, with each data set, number of images and seed."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, load) in enumerate(DATA.items()):
            train, test = write_halves(load(), Path(folder, str(number)))
            for shots in SHOTS:
                for seed in seeds:
                    here = (base, train, test, shots, seed)
                    for way, transfer in WAYS.items():
                        before = time.process_time()
                        accuracy, seconds = transfer(*here, budget)
                        busy = time.process_time() - before
                        yield Row(name, shots, seed, way, accuracy, seconds, busy)


def table(rows: Sequence[Row]) -> str:
    """Return mean accuracies (and their standard deviations) and median times, as Markdown."""
    lines = [
        "| data | images a class | bitfast finetune | Trainer | probe | training: bitfast | Trainer "
        "| CPU time: bitfast | Trainer |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for data, shots in dict.fromkeys((row.data, row.shots) for row in rows):
        of = {
            way: [r for r in rows if (r.data, r.shots, r.way) == (data, shots, way)] for way in WAYS
        }
        cells = [_accuracy([row.accuracy for row in found]) for found in of.values()]
        cells += [
            f"{statistics.median(getattr(row, name) for row in of[way]):.1f} s"
            for name in ("seconds", "cpu_seconds")
            for way in ("fine-tuning", "Trainer")
        ]
        lines.append(f"| {data} | {shots} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--steps", type=int, default=Budget.steps, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=Budget.learning_rate, metavar="X")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    arguments = parser.parse_args()
    budget = Budget(steps=arguments.steps, learning_rate=arguments.learning_rate)
    import_torchvision()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder, "base"))
        for row in compare(base, budget, arguments.seeds):
            rows.append(row)
            print(f"{row.data}, {row.shots}, seed {row.seed}: {row.way} "
                f"{100 * row.accuracy:.1f} %, {row.seconds:.1f} s", file=sys.stderr, flush=True)  # fmt: skip
    print(table(rows))
    if arguments.output is not None:
        content = {
            "machine": machine("cpu"), "threads": arguments.threads, "budget": asdict(budget),
            "rows": [asdict(r) for r in rows],
        }  # fmt: skip
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
