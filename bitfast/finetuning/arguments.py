"""The arguments of ``bitfast finetune``, and how it ends. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUCCESS, FAILED, USAGE_ERROR = 0, 1, 2

SUMMARY = "transfer a checkpoint to your own images"

DESCRIPTION = """\
Fine-tune a BiT checkpoint to your own images, by the recipe of the paper (BiT-HyperRule).

DATA is one of
  folder   with a folder of images for each class, or with such folders in train/ and valid/
  file     CSV or Parquet with the columns path (or image) and label
  folder   that the package datasets has saved
DIR gets config.json, model.safetensors and preprocessor_config.json, which bitfast and transformers
load; metrics.jsonl, curves.png, confusion.png, report.json, report.csv; and a model card, README.md.
Interrupted, the same command goes on where it was."""

EPILOG = """\
What is chosen, and why, goes to standard output; progress to standard error.
Several GPUs or machines: torchrun --nproc-per-node N -m bitfast finetune ...

exit status: 0 done, or done before; 1 it failed on the way, and the last checkpoint stays; 2 wrong
arguments, unusable data, or DIR not free; 130 interrupted (143: terminated)"""


def number(
    kind: type[int] | type[float], least: float, most: float = float("inf"), *, above: bool = False
) -> Callable[[str], Any]:
    """Return a type for argparse: numbers from ``least`` (or above it) to ``most``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            is_enough = value > least or (value == least and not above)
            if is_enough and value <= most and value != float("inf"):
                return value
        except ValueError:
            pass
        what = "an integer" if kind is int else "a number"
        bounds = f"{'above' if above else 'of at least'} {least:g}"
        if most != float("inf"):
            bounds += f" and at most {most:g}"
        raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text!r}")

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder or file")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder, new or empty, or of an earlier run",
    )
    add("--model", default="google/bit-50", metavar="NAME_OR_PATH",
        help="a checkpoint's folder or file, or its name on the Hub (default: %(default)s)")  # fmt: skip
    add(
        "--overwrite",
        action="store_true",
        help="begin anew, and remove the earlier run that DIR has in it",
    )

    data = parser.add_argument_group("data").add_argument
    data("--valid", type=Path, metavar="DATA", help="validation images, in the same forms")
    data("--valid-fraction", type=number(float, 0, 0.9), metavar="F",
        help="of each class, held out for validation if there is nothing else (default: 0.1)")  # fmt: skip
    data("--per-class", type=number(int, 1), metavar="N",
        help="few-shot: training images of each class, drawn by the seed (default: all)")  # fmt: skip
    data("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="decides what is held out, drawn, cropped, flipped and mixed (default: 0)")  # fmt: skip

    recipe = parser.add_argument_group("the recipe, otherwise chosen from the data").add_argument
    count: dict[str, Any] = {"type": number(int, 1), "metavar": "N"}
    recipe("--steps", **count, help="updates of the weights")
    recipe("--batch-size", **count, help="images of a step, over all processes and micro-batches")
    recipe("--learning-rate", dest="base_learning_rate", type=number(float, 0, above=True),
        metavar="X", help="after warm-up")  # fmt: skip
    recipe("--warmup", dest="warmup_steps", type=number(int, 0), metavar="N",
        help="steps in which the learning rate rises from 0")  # fmt: skip
    recipe("--decays", dest="decay_steps", type=number(int, 0), nargs="*", metavar="N",
        help="steps from which on it is a tenth of before")  # fmt: skip
    recipe("--momentum", type=number(float, 0, 0.9999), metavar="X", help="of SGD")
    recipe("--weight-decay", type=number(float, 0), metavar="X", help="of SGD")
    recipe("--resize", **count, help="edge of the square that training images are resized to")
    recipe("--crop", **count, help="edge of the square that is cut out of it, and of images later")
    recipe("--no-flip", dest="flip", action="store_const", const=False,
        help="do not mirror images: where left and right differ, as in digits")  # fmt: skip
    recipe("--mixup", dest="mixup_alpha", type=number(float, 0), metavar="ALPHA",
        help="of the distribution that images are mixed by; 0: they are not")  # fmt: skip

    machine = parser.add_argument_group("the machine").add_argument
    machine("--device", help='"cpu", "cuda" or such as "cuda:1" (default: cuda where there is one)')
    machine("--dtype", choices=("float32", "bfloat16"),
        help="bfloat16: autocast (default: bfloat16 where the device has instructions for it)")  # fmt: skip
    machine("--micro-batch", **count,
        help="images at a time, whose gradients add up to a batch (default: by the memory)")  # fmt: skip
    machine("--workers", type=number(int, 0), metavar="N",
        help="processes that read and resize images; 0: none (default: by the cores)")  # fmt: skip
    machine("--checkpoint-every", **count, help="steps (default: every five minutes)")
    machine("--evaluate-every", **count, help="steps (default: ten times in a run)")


RECIPE = (
    "steps", "batch_size", "base_learning_rate", "warmup_steps", "decay_steps", "momentum",
    "weight_decay", "resize", "crop", "flip", "mixup_alpha",
)  # fmt: skip
"""The arguments that override the recipe, by the names that it has for them."""


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune and return the exit status."""
    from bitfast.extras import MissingExtraError, require_extra

    try:
        require_extra("bitfast finetune", "finetune")
    except MissingExtraError as error:
        return _fail(error, USAGE_ERROR)
    from bitfast.finetuning.processes import are_there_others, leave

    status = _finetune(arguments)
    if are_there_others():
        leave(status)
    return status


def _finetune(arguments: argparse.Namespace) -> int:
    from bitfast.finetuning.command import finetune
    from bitfast.finetuning.errors import FinetuningError, Interrupted, PeerLost, UsageError
    from bitfast.images.files import one_line

    try:
        finetune(options_from(arguments))
    except UsageError as error:
        return _fail(error, USAGE_ERROR)
    except Interrupted as error:
        if str(error):  # the first of several processes says it
            print(f"bitfast: {error}", file=sys.stderr)
        return error.status
    except PeerLost:
        return FAILED  # another process says why
    except (FinetuningError, OSError) as error:
        return _fail(one_line(error), FAILED)
    return SUCCESS


def options_from(arguments: argparse.Namespace) -> Any:
    """Return the options that the arguments stand for."""
    from bitfast.finetuning.command import Options

    overrides = {name: getattr(arguments, name) for name in RECIPE}
    if overrides["decay_steps"] is not None:
        overrides["decay_steps"] = tuple(overrides["decay_steps"])
    given = {
        name: getattr(arguments, name)
        for name in (
            "data", "output", "model", "valid", "valid_fraction", "per_class", "seed", "micro_batch",
            "dtype", "device", "workers", "checkpoint_every", "evaluate_every", "overwrite",
        )
        if getattr(arguments, name) is not None
    }  # fmt: skip
    command = shlex.join(["bitfast", *sys.argv[1:]])
    return Options(**given, overrides=overrides, command=command)


def _fail(error: object, status: int) -> int:
    print(f"bitfast: error: {error}", file=sys.stderr)
    return status
