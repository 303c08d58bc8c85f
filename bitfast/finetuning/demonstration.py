"""The last line of ``bitfast demo``: a network that knows some digits learns the others from a few images."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bitfast.digits import held_out_images
from bitfast.digits.train import Digits, fit
from bitfast.extras import MissingExtraError, require_extra
from bitfast.finetuning.command import Options, finetune
from bitfast.measurement import Measurement

KNOWN = range(5)
"""The digits that the network learns first, from scratch; the others it is transferred to."""
EPOCHS = 30
PER_CLASS = 5
STEPS, BATCH_SIZE, LEARNING_RATE = 60, 32, 0.02


class Transfer(NamedTuple):
    """How the transfer went: on images that nothing was learned from, and in which time."""

    measurement: Measurement
    seconds: float


def show() -> None:
    """Fine-tune, and say in one line how it went, or which packages are missing."""
    try:
        require_extra("Fine-tuning", "finetune")
    except MissingExtraError as error:
        print(f"\n3. {error}", flush=True)
        return
    transfer = run()
    print(
        f"\n3. bitfast finetune: {100 * transfer.measurement.accuracy:.1f} % of "
        f"{transfer.measurement.total} digits from {max(KNOWN) + 1} to 9 right, from {PER_CLASS} images each "
        f"and a network that knew only 0 to {max(KNOWN)}, in {transfer.seconds:.1f} s",
        flush=True,
    )


def run() -> Transfer:
    """Train a small network on half of the digits from scratch, and transfer it to the others."""
    pairs = held_out_images()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (image, digit) in enumerate(pairs):
            if digit not in KNOWN:
                (folder / "data" / str(digit)).mkdir(parents=True, exist_ok=True)
                image.save(folder / "data" / str(digit) / f"{number}.png")
        known = [(image, digit) for image, digit in pairs if digit in KNOWN]
        images, digits = zip(*known, strict=True)
        model, processor = fit(Digits(list(images), list(digits)), EPOCHS, seed=0)
        model.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        edge = processor.size["height"]
        options = Options(
            folder / "data",
            folder / "result",
            str(folder / "base"),
            valid_fraction=0.8,
            per_class=PER_CLASS,
            overrides={
                "steps": STEPS, "batch_size": BATCH_SIZE, "base_learning_rate": LEARNING_RATE,
                "resize": edge + edge // 8, "crop": edge, "flip": False,
            },
            dtype="float32",
            device="cpu",
            workers=0,
            evaluate_every=STEPS,
        )  # fmt: skip
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluation = finetune(options)
    assert evaluation is not None
    return Transfer(evaluation.measurement, time.perf_counter() - started)
