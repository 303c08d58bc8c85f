"""The command ``bitfast``: its arguments, its exit statuses and what it prints.

What a subcommand needs is imported when it runs, so that help and usage errors are quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

SUCCESS = 0
SOME_FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT."""
PIPE_CLOSED = 141
"""128 + SIGPIPE, as for every program whose reader leaves early."""

DTYPES = ("float32", "bfloat16", "float16")

CLASSIFY_HELP = """\
Print the most probable labels of each image.

An IMAGE is a file, a folder or a pattern:
  file     taken whatever its name is
  folder   stands for the image files in it and below, sorted; hidden ones are left out
  pattern  (*, ?, [...], and ** for any depth; quote it) stands for its matches, sorted, as if
           each had been given
A file that several of them lead to is classified once, where it comes first."""

CLASSIFY_EPILOG = """\
Results go to standard output, everything else to standard error.
With --json each line is {"path", "predictions": [{"label", "index", "score"}, ...]}, or
{"path", "error"} for what could not be classified.

exit status: 0 all classified; 1 some failed; 2 wrong arguments or no usable model;
130 interrupted; 141 the reader of the output is gone"""

CONVERT_HELP = """\
Write a BiT checkpoint of timm or of Google as a folder in transformers' format.

SRC is one of
  file    of weights: .safetensors, .bin, .pth or .pt of timm, or .npz of Google
  folder  as timm saves a model: config.json, and model.safetensors or pytorch_model.bin
  name    of such a folder on the Hugging Face Hub
DST gets config.json, model.safetensors and preprocessor_config.json, all of them or, on any
failure, none. How large the model is, its tensors say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Raises:
        SystemExit: argparse answers ``--help``, ``--version`` and wrong arguments (status 2) itself.
    """
    arguments = build_parser().parse_args(argv)
    # A file name or label that the terminal's encoding lacks must not end the run.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("bitfast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. The parsed arguments hold the chosen subcommand's function as ``run``."""
    import bitfast

    parser = argparse.ArgumentParser(
        prog="bitfast", description="Big Transfer (BiT) image models, fast."
    )
    parser.add_argument("--version", action="version", version=f"bitfast {bitfast.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    _add_classify(commands)
    _add_rooms(commands)
    _add_convert(commands)
    _add_demo(commands)
    _add_env(commands)
    _add_bench(commands)
    return parser


class _CommandParser(argparse.ArgumentParser):
    """A command's parser, which refuses unknown arguments with the usage of that command.

    argparse leaves those to the main parser, whose usage says nothing about the command.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def _add_classify(commands: Any) -> None:
    parser = commands.add_parser(
        "classify",
        help="print the most probable labels of images",
        description=CLASSIFY_HELP,
        epilog=CLASSIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="a checkpoint's folder, or its name on the Hugging Face Hub "
        "(default: the model of handwritten digits that comes with bitfast)",
    )
    parser.add_argument(
        "--top-k",
        type=positive_integer,
        default=5,
        metavar="K",
        help="labels per image, at most as many as the model has (default: 5)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        default=8,
        metavar="N",
        help="images that go through the model together (default: 8)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"default: {DTYPES[0]}")
    parser.add_argument(
        "--device", help='such as "cpu" or "cuda:1" (default: cuda where there is one, else cpu)'
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    parser.set_defaults(run=run_classify, refuse=parser.error)


def _add_rooms(commands: Any) -> None:
    from bitfast.embedding import arguments as embed
    from bitfast.finetuning import arguments as finetune
    from bitfast.serving import arguments as serve

    for name, module in (("embed", embed), ("finetune", finetune), ("serve", serve)):
        parser = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parser.set_defaults(run=module.run, refuse=parser.error)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint of timm or Google in transformers' format",
        description=CONVERT_HELP,
        epilog="exit status: 0 written; 2 wrong arguments, no such checkpoint, or DST not free",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="file, folder or name on the Hub")
    parser.add_argument("destination", metavar="DST", help="folder, new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as in SRC)")
    parser.add_argument(
        "--image-size",
        type=positive_integer,
        metavar="N",
        help="height and width of the model's images (default: as SRC says, else that of the released "
        "models' fine-tuning: 448, and 480 for R152x4)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the BiT model that DST has in it"
    )
    parser.set_defaults(run=run_convert)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="classify digits, and compare with transformers on this machine",
        description="Classify held-out digits with the model that comes with bitfast, then run a full "
        "R50x1 through transformers and bitfast, on the CPU: check that they agree, and measure both. Last, "
        "fine-tune a network that knows some digits to the others.",
    )
    parser.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="CPU threads (default: as many as torch chooses)",
    )
    parser.set_defaults(run=run_demo)


def _add_env(commands: Any) -> None:
    parser = commands.add_parser(
        "env",
        help="print versions, hardware and which backends run here, or why not",
        description="Print versions, hardware and which backend runs each op here, or why not.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with status 1 if an op runs as plain PyTorch though there is a kernel for such a device",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="also print which convolutions of R50x1 a GPU computes fused with norms, and why",
    )
    parser.set_defaults(run=run_env)


def _add_bench(commands: Any) -> None:
    from bitfast.bench import run as bench

    parser = commands.add_parser(
        "bench",
        help="measure ops and whole models beside others on this machine",
        description="Check and measure bitfast's ops beside plain PyTorch, and image processors and whole "
        "models beside transformers, other runtimes and compiled forms, on a CPU or a GPU.",
        epilog=bench.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def positive_integer(text: str) -> int:
    """Return the integer that an argument holds.

    Raises:
        argparse.ArgumentTypeError: it is none, or less than 1.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


# ---- bitfast classify ---------------------------------------------------------------------------


def run_classify(arguments: argparse.Namespace) -> int:
    """Classify the images and return the exit status."""
    from bitfast.commands import classify
    from bitfast.images.files import find_images, one_line

    try:
        device = classify.find_device(arguments.device)
    except ValueError as error:
        arguments.refuse(f"argument --device: {one_line(error)}")
    model = str(classify.default_model()) if arguments.model is None else arguments.model
    try:
        classifier = classify.Classifier.load(model, device, arguments.dtype)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return _usage_error(f"the model {model!r} cannot be loaded: {one_line(error)}")

    started = time.perf_counter()
    candidates = find_images(arguments.images)
    failed = 0
    with classify.Printer(len(candidates), arguments.json) as printer:
        for outcomes in classifier.classify_files(
            candidates, arguments.batch_size, arguments.top_k
        ):
            for outcome in outcomes:
                printer.show(outcome)
                failed += outcome.error is not None
            sys.stdout.flush()
    seconds = time.perf_counter() - started
    classified = len(candidates) - failed
    print(f"{classified} classified, {failed} failed, in {seconds:.1f} s", file=sys.stderr)
    return SOME_FAILED if failed else SUCCESS


# ---- bitfast convert ----------------------------------------------------------------------------


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert the checkpoint, print what was found and assumed, and return the exit status."""
    from pathlib import Path

    from bitfast.commands import convert
    from bitfast.configuration_values import parse_dtype
    from bitfast.images.files import one_line

    folder = Path(arguments.destination)
    try:
        converted = convert.convert(
            arguments.source,
            folder,
            dtype=parse_dtype("dtype", arguments.dtype),
            image_size=arguments.image_size,
            overwrite=arguments.overwrite,
        )
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        return _usage_error(f"{arguments.source!r} cannot be converted: {one_line(error)}")
    print(convert.as_text(converted, folder))
    return SUCCESS


# ---- the other commands -------------------------------------------------------------------------


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit status: 1 if bitfast and transformers disagree."""
    from bitfast.commands import demo
    from bitfast.finetuning import demonstration

    agrees = demo.run(arguments.threads)
    demonstration.show()
    return SUCCESS if agrees else SOME_FAILED


def run_env(arguments: argparse.Namespace) -> int:
    """Print what ``bitfast.commands.environment`` finds, and return the exit status."""
    from bitfast.commands import environment

    found = environment.describe()
    if arguments.plan:
        from bitfast.commands import gpu_plan

        found["plan"] = gpu_plan.describe()
    print(json.dumps(found, indent=2) if arguments.json else environment.as_text(found))
    if arguments.plan and not arguments.json:
        print(f"\n{gpu_plan.as_text(found['plan'])}")
    missing = environment.missing_kernels(found) if arguments.check else []
    for problem in missing:
        print(problem, file=sys.stderr)
    return SOME_FAILED if missing else SUCCESS


def _usage_error(message: str) -> int:
    print(f"bitfast: error: {message}", file=sys.stderr)
    return USAGE_ERROR


def _discard_output() -> None:
    """Redirect output to nowhere: the interpreter's last flush to a closed pipe would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
