"""The arguments of ``bitfast embed``. What the command needs is imported when it runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

SUFFIXES = (".parquet", ".npy", ".safetensors")

SUMMARY = "write the features of images as vectors"

DESCRIPTION = """\
Write the features of images as vectors, one for each image, in the order given.

An IMAGE is a file, a folder or a pattern, as for bitfast classify, or a tar shard, whose images
are read in place. A range, as in 'shard-{000..010}.tar', stands for the names in it.

FILE ends in one of
  .parquet      columns "name" and "embedding"
  .npy          an array (images, dimension), and the names in FILE.names.json
  .safetensors  a tensor "embeddings" of that shape, and the names in FILE.names.json
Images that cannot be embedded are left out, and listed with the reason in FILE.failed.csv."""

EPILOG = """\
The work is kept in FILE.partial as it is done, beside FILE: however a run ended, the same command
again goes on from there, and comes to the same bytes.

exit status: 0 all embedded; 1 some failed; 2 wrong arguments, no usable model, or FILE cannot be
written; 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    from bitfast.cli import DTYPES, positive_integer

    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="file, folder, pattern or tar shard")
    add("--list", metavar="LIST", help='more IMAGEs, one a line, of a file; "-": standard input')
    add("--output", required=True, type=output_file, metavar="FILE", help=" or ".join(SUFFIXES))
    add("--overwrite", action="store_true",
        help="replace FILE, and an unfinished run of other settings")  # fmt: skip
    add("--model", metavar="NAME_OR_PATH",
        help="a checkpoint's folder, or its name on the Hugging Face Hub "
        "(default: the model of handwritten digits that comes with bitfast)")  # fmt: skip
    add("--layer", default="pooled",
        help="pooled: what the classifier reads; logits: what it gives; stage1, stage2, ...: a stage's "
        "output, averaged over its positions (default: pooled)")  # fmt: skip
    add("--store", choices=("float32", "float16"), default="float32",
        help="the vectors' numbers in FILE (default: float32)")  # fmt: skip
    add("--batch-size", type=positive_integer, default=32, metavar="N",
        help="images that go through the model together (default: 32)")  # fmt: skip
    add("--workers", type=positive_integer, metavar="N",
        help="threads that decode images (default: one for each CPU)")  # fmt: skip
    add("--dtype", choices=DTYPES, default=DTYPES[0],
        help=f"of the model (default: {DTYPES[0]})")  # fmt: skip
    add("--device", help='such as "cpu" or "cuda:1" (default: cuda where there is one, else cpu)')
    add("--ray", nargs="?", const="local", type=ray_address, metavar="ADDRESS",
        help='run on Ray: on the cluster at ADDRESS (host:port, or "auto": the one that this machine '
        "belongs to), or on one that is started here for this command")  # fmt: skip
    add("--ray-workers", type=positive_integer, metavar="N",
        help="workers, each with a model of its own (default: one for each GPU, or else one for each "
        "machine)")  # fmt: skip


def output_file(text: str) -> Path:
    """Return the path of the output.

    Raises:
        argparse.ArgumentTypeError: no format goes by its suffix, or it cannot be a file there.
    """
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(SUFFIXES)}, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def ray_address(text: str) -> str:
    """Return the address of a Ray cluster.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    # Ray Data does not run through a client's address, ray://host:port.
    if not re.fullmatch(r"local|auto|[^/\s]+:\d+", text):
        raise argparse.ArgumentTypeError(f"ADDRESS must be host:port, auto or local, got {text!r}")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Embed the images and return the exit status."""
    if not arguments.images and arguments.list is None:
        arguments.refuse("the following arguments are required: IMAGE, or --list")
    if arguments.ray_workers is not None and arguments.ray is None:
        arguments.refuse("argument --ray-workers: needs --ray")
    from bitfast.embedding import command

    return command.run(arguments)
