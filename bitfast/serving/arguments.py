"""The arguments of ``bitfast serve``. Nothing heavy is imported before they have been checked."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bitfast.serving.settings import DTYPES, MIB, CannotStartError, Settings

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

SUMMARY = "serve a model over HTTP"

DESCRIPTION = """\
Serve a model over HTTP: POST an image to /classify or /embed, or tensors by the Open Inference
Protocol; / is a page to try it, /docs describes all. Runs on a Ray of its own on this machine;
bitfast.serving.app(...) gives the same application to "serve deploy" on a cluster."""

EPILOG = """\
When the server is ready it prints one line with its address to standard output.
SIGTERM and SIGINT: new requests are refused, those accepted are answered, then it ends. A second
signal ends it without these answers, a third one at once.

exit status: 0 ended by SIGTERM; 1 it no longer answers; 2 wrong arguments, no usable model or address;
130 ended by SIGINT (Ctrl-C)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    from bitfast.cli import positive_integer

    add = parser.add_argument
    count: dict[str, Any] = {"type": positive_integer, "metavar": "N"}
    add(
        "--model",
        metavar="NAME_OR_PATH",
        help="a checkpoint's folder, or its name on the Hugging Face Hub "
        "(default: the model of handwritten digits that comes with bitfast)",
    )
    add("--name", help="the model's name in URLs (default: the last part of --model)")
    add(
        "--dtype",
        choices=DTYPES,
        default=Settings.dtype,
        help="auto: the checkpoint's (default: auto)",
    )
    add(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help=f"address to listen on (default: {DEFAULT_HOST}; 0.0.0.0: all of this machine's)",
    )
    add(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"0: one that is free (default: {DEFAULT_PORT})",
    )
    add(
        "--replicas",
        type=_replicas,
        default=Settings.replicas,
        metavar="N|MIN:MAX",
        help="processes that hold the model; MIN:MAX: as many as the load needs (default: 1)",
    )
    add(
        "--cpus-per-replica",
        **count,
        help="cores, and threads, of each replica (default: this machine's, shared out among them)",
    )
    add(
        "--gpus-per-replica",
        type=_number,
        metavar="N",
        help="GPUs of each replica, such as 1 or 0.5; 0: compute on the CPU "
        "(default: this machine's, shared out among them, at most 1)",
    )

    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--batch-size",
        default=Settings.batch_size,
        **count,
        help=f"images that go through the model together, at most (default: {Settings.batch_size})",
    )
    batches.add_argument(
        "--batch-wait",
        type=_number,
        default=Settings.batch_wait,
        metavar="SECONDS",
        help=f"an image waits so long for others, at most (default: {Settings.batch_wait:g})",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-request-bytes",
        default=Settings.max_request_bytes,
        **count,
        help=f"of a request's body (default: {Settings.max_request_bytes // MIB} MiB)",
    )
    limits.add_argument(
        "--max-image-pixels",
        default=Settings.max_image_pixels,
        **count,
        help=f"width times height of an image (default: {Settings.max_image_pixels:,})",
    )
    limits.add_argument(
        "--max-images",
        default=Settings.max_images,
        **count,
        help=f"in a request (default: {Settings.max_images})",
    )
    limits.add_argument(
        "--max-queue",
        default=Settings.max_queue,
        **count,
        help=f"images that a replica has accepted and not answered (default: {Settings.max_queue})",
    )
    limits.add_argument(
        "--body-timeout",
        type=_number,
        default=Settings.body_timeout,
        metavar="SECONDS",
        help=f"in which a request's body arrives (default: {Settings.body_timeout:g})",
    )
    limits.add_argument(
        "--request-timeout",
        type=_number,
        default=Settings.request_timeout,
        metavar="SECONDS",
        help=f"in which a request is answered (default: {Settings.request_timeout:g})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit status."""
    from bitfast.cli import USAGE_ERROR
    from bitfast.extras import MissingExtraError, require_extra

    options = dict(vars(arguments))
    host, port = options.pop("host"), options.pop("port")
    for name in ("run", "refuse"):
        options.pop(name, None)
    try:
        settings = Settings.of(options.pop("model"), **options)
    except ValueError as error:
        option, _, rest = str(error).partition(" ")
        arguments.refuse(f"argument --{option.replace('_', '-')}: {rest}")
    try:
        require_extra("bitfast serve", "serve")
        from bitfast.serving import run as server

        return server.serve(settings, host, port)
    except (CannotStartError, MissingExtraError) as error:
        print(f"bitfast: error: {error}", file=sys.stderr)
        return USAGE_ERROR


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _replicas(text: str) -> int | tuple[int, int]:
    """Return "N" as a number, "MIN:MAX" as a pair."""
    parts = text.split(":")
    if not 1 <= len(parts) <= 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"must be N or MIN:MAX, got {text!r}")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
