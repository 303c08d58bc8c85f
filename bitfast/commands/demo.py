"""What ``bitfast demo`` shows: the embedded model reading digits, and a comparison with transformers."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast.commands import comparison
from bitfast.commands.classify import Classifier, default_model
from bitfast.commands.environment import cpu_model, package_version, versions
from bitfast.configuration import BitConfig
from bitfast.images.processing import BitImageProcessor
from bitfast.modeling import BitForImageClassification

SHADES = " ░▒▓█"
ASCII_SHADES = " .:*#"
ART_SIZE = 8

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "camera.png",
)
"""Photographs in scikit-image's package."""

ROUNDS = 9
TIME_BUDGET = 30.0

say = functools.partial(print, flush=True)  # flushed, since the sections take a while


def run(threads: int | None = None) -> bool:
    """Show the whole demo; return whether bitfast and transformers agree.

    Args:
        threads: CPU threads; None: as many as torch has chosen.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = versions()
    names = ("bitfast", "python", "torch", "transformers")
    say(", ".join(f"{name} {found[name] or 'is not installed'}" for name in names))
    count = torch.get_num_threads()
    say(f"{cpu_model()}, device cpu, {count} thread{'s' if count > 1 else ''}, float32")
    show_digits()
    return show_comparison()


# ---- digits -------------------------------------------------------------------------------------


def show_digits(model: Path | None = None, shown: int = 4) -> None:
    """Classify the held-out digits, draw some of them, and print the accuracy over all."""
    from bitfast.digits import held_out_images

    classifier = Classifier.load(str(model or default_model()), torch.device("cpu"), "float32")
    images, digits = zip(*held_out_images(), strict=True)
    started = time.perf_counter()
    probabilities = classify(classifier, images)
    seconds = time.perf_counter() - started
    scores, indices = (values.tolist() for values in probabilities.max(dim=-1))
    labels = [classifier.label(index) for index in indices]
    correct = sum(label == str(digit) for label, digit in zip(labels, digits, strict=True))

    say("\n1. Handwritten digits that the embedded model has not seen in training\n")
    columns = []
    for i in range(0, len(images), max(1, len(images) // shown)):
        caption = [f"says {labels[i]}, {100 * scores[i]:.2f} %", f"it is {digits[i]}"]
        columns.append([*art(images[i]), *caption])
    for cells in zip(*columns[:shown], strict=True):
        say("  " + "   ".join(cell.ljust(2 * ART_SIZE) for cell in cells).rstrip())
    say(
        f"\n  Right: {correct} of {len(images)} images, {100 * correct / len(images):.1f} %, "
        f"in {seconds:.1f} s"
    )


def classify(classifier: Classifier, images: Sequence[Image.Image], batch_size: int = 50) -> Tensor:
    """Return the probabilities of all images, shape (N, labels)."""
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat(
        [
            classifier.probabilities(torch.stack([classifier.preprocess(image) for image in batch]))
            for batch in batches
        ]
    )


def art(image: Image.Image) -> list[str]:
    """Return an image as lines of block characters, or of ASCII where the terminal has no others."""
    try:
        SHADES.encode(sys.stdout.encoding or "ascii")
        shades = SHADES
    except UnicodeEncodeError:
        shades = ASCII_SHADES
    pixels = np.asarray(image.convert("L").resize((ART_SIZE, ART_SIZE), Image.Resampling.BOX))
    levels = pixels.astype(int) * len(shades) // 256
    return ["".join(2 * shades[level] for level in row) for row in levels]


# ---- the comparison -----------------------------------------------------------------------------


def show_comparison(
    config: BitConfig | None = None, batch_size: int = 8, image_size: int = 224
) -> bool:
    """Run a network with random weights through transformers and bitfast and print how they compare.

    Args:
        config: The network; by default R50x1 with 1000 labels.
        batch_size: Images per run.
        image_size: Their height and width.

    Returns:
        Whether the outputs agree. If not, nothing is said about speed.
    """
    name = "R50x1, 1000 labels" if config is None else "A network"
    config = config or BitConfig(num_labels=1000)
    images, kind = example_images(batch_size)
    processor = BitImageProcessor(size={"shortest_edge": image_size}, crop_size=image_size)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    libraries = ["bitfast"]
    if package_version("transformers") is not None:
        libraries.insert(0, "transformers")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        model = BitForImageClassification(config)
        model.save_pretrained(folder)
        say(
            f"\n2. {name}, random weights ({model.num_parameters() / 1e6:.1f} million), "
            f"{batch_size} {kind} of {image_size}x{image_size}\n"
        )
        del model
        models = {library: comparison.load(library, folder) for library in libraries}
        if len(models) == 1:
            say("  transformers is not installed: bitfast runs alone, compared with nothing.")
        elif not _show_agreement(
            [comparison.logits(model, pixel_values) for model in models.values()]
        ):
            return False
        seconds = comparison.time_in_turns(models, pixel_values, ROUNDS, TIME_BUDGET)
        del models
        memory, problems = _measure_memory(libraries, folder, pixel_values)
    _show_measurements(seconds, memory)
    for problem in problems:
        say(f"  {problem}")
    return True


def example_images(count: int) -> tuple[list[Image.Image], str]:
    """Return ``count`` images and what they are: scikit-image's photographs if it is installed."""
    spec = importlib.util.find_spec("skimage")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = [Path(folder, "data", name) for folder in folders for name in PHOTOGRAPHS]
    paths = [path for path in paths if path.is_file()]
    if paths:
        return [Image.open(paths[i % len(paths)]) for i in range(count)], "photographs"
    pixels = np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels], "random images"


def _show_agreement(outputs: list[Tensor]) -> bool:
    agreement = comparison.compare(*outputs)
    say("  Difference of the logits")
    say(f"    largest                      {agreement.largest:.1e}")
    say(f"    norm / norm of the logits    {agreement.relative:.1e}")
    limit = comparison.RELATIVE_LIMIT
    if agreement.good:
        say(f"    agreed: the latter is at most {limit:.0e}\n")
    else:
        say(f"    NOT agreed: the latter must be at most {limit:.0e}, so no speed is shown.")
    return agreement.good


def _measure_memory(
    libraries: list[str], folder: Path, pixel_values: Tensor
) -> tuple[dict[str, int], list[str]]:
    """Return the peak of each library in bytes, and why those that are missing are."""
    memory, problems = {}, []
    for library in libraries:
        try:
            memory[library] = comparison.peak_memory(library, folder, pixel_values)
        except RuntimeError as error:
            problems.append(f"Peak memory of {library} was not measured: {error}")
    return memory, problems


def _show_measurements(seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    libraries = list(seconds)
    milliseconds = {library: 1e3 * statistics.median(seconds[library]) for library in libraries}
    mebibytes = {library: peak / 2**20 for library, peak in memory.items()}
    head = [*libraries, " / ".join(libraries)] if len(libraries) == 2 else libraries
    say(_table_row("", head))
    say(_table_row("time of a batch", _cells(libraries, milliseconds, "ms")))
    say(_table_row("peak memory", _cells(libraries, mebibytes, "MiB")))
    say(
        f"\n  Time: median of {len(seconds[libraries[0]])} runs, libraries in turns, same process.\n"
        "  Memory: resident set of a fresh process each: import, load, run twice."
    )


def _cells(libraries: list[str], values: dict[str, float], unit: str) -> list[str]:
    """Return the libraries' values, and their ratio if there are two."""
    cells = [f"{values[name]:.0f} {unit}" if name in values else "-" for name in libraries]
    if len(libraries) == 2:
        theirs, ours = (values.get(library) for library in libraries)
        cells.append(f"{theirs / ours:.2f}" if theirs and ours else "-")
    return cells


def _table_row(title: str, cells: list[str]) -> str:
    return f"  {title:16}" + "".join(f"{cell:>{max(14, len(cell) + 3)}}" for cell in cells)
