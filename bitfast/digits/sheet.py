"""Many small images of one size as one lossless PNG, with their labels in a JSON file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from bitfast.checkpoints.files import CheckpointError, read_json, write_json_atomically

SHEET_NAME = "held_out.png"
LABELS_NAME = "held_out.json"
COLUMNS = 25


def write_sheet(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> None:
    """Write grayscale images and their labels into a folder.

    Args:
        folder: An existing folder; it gets ``held_out.png`` and ``held_out.json``.
        images: At least one image, all of one size and of mode "L".
        labels: One per image.
    """
    width, height = images[0].size
    sheet = Image.new("L", (COLUMNS * width, _rows(len(images), COLUMNS) * height))
    for image, box in zip(images, _boxes(len(images), COLUMNS, width, height), strict=True):
        sheet.paste(image, box)
    sheet.save(folder / SHEET_NAME, optimize=True)
    content = {"width": width, "height": height, "columns": COLUMNS, "labels": list(labels)}
    write_json_atomically(folder / LABELS_NAME, content)


def read_sheet(folder: Path) -> list[tuple[Image.Image, int]]:
    """Return the images, in mode "L", and labels that :func:`write_sheet` wrote into a folder.

    Raises:
        CheckpointError: a file is missing or broken, or the two do not belong together.
    """
    content = read_json(folder / LABELS_NAME)
    width, height, columns = (content.get(key, 0) for key in ("width", "height", "columns"))
    labels = content.get("labels", [])
    try:
        sheet = Image.open(folder / SHEET_NAME).convert("L")
    except OSError as error:
        raise CheckpointError(f"{folder / SHEET_NAME} is not a readable image: {error}") from error
    if sheet.size != (columns * width, _rows(len(labels), columns) * height):
        raise CheckpointError(
            f"{folder / SHEET_NAME} of {sheet.size} pixels is not the sheet of {columns} columns of "
            f"{width}x{height} images that {LABELS_NAME} labels"
        )
    images = [sheet.crop(box) for box in _boxes(len(labels), columns, width, height)]
    return list(zip(images, labels, strict=True))


def _rows(count: int, columns: int) -> int:
    return -(-count // columns) if columns else 0


def _boxes(
    count: int, columns: int, width: int, height: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, upper, right, lower) of each image, row by row."""
    for index in range(count):
        row, column = divmod(index, columns)
        left, upper = column * width, row * height
        yield left, upper, left + width, upper + height
