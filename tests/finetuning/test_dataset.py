"""Labelled images: each form that they come in, how they are divided, and what is wrong with some."""

from __future__ import annotations

import functools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bitfast.finetuning.dataset import Dataset, Problem, Splits, open_splits
from bitfast.finetuning.forms import natural_order

COUNTS = {"class 10": 6, "class 9": 10, "empty handed": 1}


def picture(number: int) -> Image.Image:
    """Return an image whose first pixel tells its number."""
    pixels = np.full((5 + number % 3, 7, 3), 50, np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def number_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def write_folder(folder: Path, counts: dict[str, int] = COUNTS, first: int = 0) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(first).save(folder / name / f"image {i}.png")
            first += 1
    return folder


def contents(dataset: Dataset, classes: tuple[str, ...]) -> dict[int, str]:
    """Return the class of each image, by the number in its pixels; all that is kept is checked."""
    found = {}
    for i in range(len(dataset)):
        image = dataset.read(i)
        assert image.mode == "RGB"
        assert dataset.sizes[i].tolist() == [image.height, image.width]
        assert dataset.name(i) == dataset.names[i]
        found[number_of(image)] = classes[dataset.labels[i]]
    assert len(found) == len(dataset)
    return found


def everything(splits: Splits) -> dict[int, str]:
    training = contents(splits.training, splits.classes)
    validation = contents(splits.validation, splits.classes)
    assert not training.keys() & validation.keys()
    return {**training, **validation}


def expected(counts: dict[str, int] = COUNTS, first: int = 0) -> dict[int, str]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return dict(enumerate(names, first))


# ---- forms --------------------------------------------------------------------------------------


def test_folder_per_class(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "class 9" / "deeper").mkdir()
    picture(99).save(folder / "class 9" / "deeper" / "more.jpg", quality=100, subsampling=0)
    (folder / "class 9" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    (folder / "nothing here").mkdir()
    (folder / "README.md").write_text("about")
    splits = open_splits(folder, valid_fraction=0)
    assert splits.classes == ("class 9", "class 10", "empty handed")
    found = contents(splits.training, splits.classes)
    assert {n: name for n, name in found.items() if n < 50} == expected()
    assert len(splits.training) == 18
    assert len(splits.validation) == 0
    assert "class 9/deeper/more.jpg" in splits.training.names
    assert splits.problems == []
    assert [note for note in splits.notes if "nothing here" in note]
    assert [note for note in splits.notes if "in no class's folder, not used: 1" in note]


@pytest.mark.parametrize("name", ["valid", "val", "Validation", "test"])
def test_folder_with_splits(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / name, {"class 9": 2, "class 10": 1}, first=30)
    splits = open_splits(tmp_path)
    assert contents(splits.training, splits.classes) == expected()
    assert contents(splits.validation, splits.classes) == {
        30: "class 9", 31: "class 9", 32: "class 10",
    }  # fmt: skip
    assert [note for note in splits.notes if "empty handed" in note]


def test_of_several_splits_test_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", {"class 9": 2}, first=30)
    write_folder(tmp_path / "test", {"class 9": 3}, first=40)
    splits = open_splits(tmp_path)
    assert sorted(contents(splits.validation, splits.classes)) == [30, 31]
    assert [note for note in splits.notes if "the split 'test' is not used" in note]


def test_train_may_be_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 3, "test": 3})
    assert open_splits(tmp_path).classes == ("test", "train")


def test_validation_from_elsewhere_in_another_form(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    write_folder(tmp_path / "more", {"class 9": 2}, first=30)
    table = tmp_path / "valid.csv"
    table.write_text("path,label\nmore/class 9/image 0.png,class 10\n")
    splits = open_splits(folder, valid=table)
    assert contents(splits.training, splits.classes) == expected()
    assert contents(splits.validation, splits.classes) == {30: "class 10"}


def test_csv(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    absolute = tmp_path / "images" / "class 9" / "image 0.png"
    rows = [
        "comment,File_Name,Label,split",
        '"with, comma",images/class 10/image 0.png,"b, ""2""",train',
        f",{absolute},a,train",
        "",
        ",images/../images/class 9/image 1.png,a,test",
        ",images/class 9/image 2.png,,train",
        ",images/class 9/none.png,a,train",
        ",images/class 9/image 3.png,a,other",
    ]
    (tmp_path / "data.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    splits = open_splits(tmp_path / "data.csv")
    assert splits.classes == ("a", 'b, "2"')
    assert contents(splits.training, splits.classes) == {0: 'b, "2"', 6: "a"}
    assert contents(splits.validation, splits.classes) == {7: "a"}
    assert splits.problems == [
        Problem("images/class 9/image 2.png", "no label"),
        Problem("images/class 9/none.png", "No such file or directory"),
    ]
    assert [note for note in splits.notes if "the split 'other' is not used" in note]


def test_parquet_of_paths(tmp_path: Path) -> None:
    write_folder(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.png"))
    labels = pa.array([name.split("/")[0] for name in names]).dictionary_encode()
    pq.write_table(pa.table({"path": names, "label": labels}), tmp_path / "data.parquet")
    splits = open_splits(tmp_path / "data.parquet")
    assert splits.classes == ("class 9", "class 10", "empty handed")
    assert everything(splits) == expected()
    assert set(splits.training.names) | set(splits.validation.names) == set(names)


def test_parquet_of_bytes_and_whole_numbers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    files = sorted(folder.glob("*/*.png"))
    images = [file.read_bytes() for file in files]
    labels = [COUNTS[file.parent.name] for file in files]
    table = pa.table({"image": [*images, None], "label": [*labels, 6]})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=5)
    splits = open_splits(tmp_path / "data.parquet")
    assert splits.classes == ("1", "6", "10")
    assert everything(splits) == {n: str(COUNTS[name]) for n, name in expected().items()}
    assert splits.problems == [Problem("row 17", "neither bytes nor a path")]


def test_parquet_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [b"x" * 10**6], "label": ["a"]}), tmp_path / "data.parquet")
    monkeypatch.setattr("tempfile.TemporaryFile", functools.partial(open, "/dev/full", "wb"))
    with pytest.raises(OSError, match=r"cannot be copied to .*TMPDIR.*: No space left on device"):
        open_splits(tmp_path / "data.parquet")


NAMES = ["zebra", "empty handed", "class 9", "class 10"]


def hugging_face(folder: Path) -> datasets.Dataset:
    files = sorted(folder.glob("*/*.png"))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    columns = {
        "image": [str(file) for file in files],
        "label": [NAMES.index(file.parent.name) for file in files],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("is_embedded", [True, False])
def test_parquet_of_datasets(tmp_path: Path, is_embedded: bool) -> None:
    data = hugging_face(write_folder(tmp_path / "images"))
    if is_embedded:
        table = datasets.table.embed_table_storage(data.data.table)
        data = datasets.Dataset(pa.Table.from_batches(table.to_batches()), info=data.info)
    data.to_parquet(tmp_path / "data.parquet")
    schema = pq.read_schema(tmp_path / "data.parquet")
    assert b"huggingface" in schema.metadata
    splits = open_splits(tmp_path / "data.parquet")
    assert splits.classes == tuple(NAMES)
    assert everything(splits) == expected()
    assert [note for note in splits.notes if "without a training image: zebra" in note]


def test_saved_dataset(tmp_path: Path) -> None:
    data = hugging_face(write_folder(tmp_path / "images"))
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    splits = open_splits(tmp_path / "saved")
    assert splits.classes == tuple(NAMES)
    assert everything(splits) == expected()


def test_saved_dataset_with_splits(tmp_path: Path) -> None:
    data = hugging_face(write_folder(tmp_path / "images"))
    data.train_test_split(0.3, seed=0).save_to_disk(tmp_path / "saved")
    splits = open_splits(tmp_path / "saved")
    assert len(splits.training) == 11
    assert len(splits.validation) == 6
    assert everything(splits) == expected()


def test_saved_dataset_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    hugging_face(write_folder(tmp_path / "images")).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../other.arrow"
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="outside the folder"):
        open_splits(tmp_path / "saved")


@pytest.mark.parametrize("form", ["folder", "parquet", "saved"])
def test_pickled_datasets_read_the_same(tmp_path: Path, form: str) -> None:
    folder = write_folder(tmp_path / "folder")
    data = hugging_face(folder)
    pq.write_table(
        pa.table({"image": [file.read_bytes() for file in sorted(folder.glob("*/*.png"))],
                  "label": data["label"][:]}),
        tmp_path / "parquet.parquet",
    )  # fmt: skip
    data.save_to_disk(tmp_path / "saved")
    path = tmp_path / ("parquet.parquet" if form == "parquet" else form)
    training = open_splits(path).training
    pickled = pickle.dumps(training)
    assert b"PNG" not in pickled  # images stay where they are
    copy = pickle.loads(pickled)
    for i in range(len(training)):
        assert copy.read(i) == training.read(i)
    assert copy.fingerprint() == training.fingerprint()


def test_natural_order() -> None:
    names = ["b1", "B10", "b2", "a", "2", "10", ""]
    assert sorted(names, key=natural_order) == ["", "2", "10", "a", "b1", "b2", "B10"]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", {"a": 2, "b": 2})
    try:
        (folder / "a" / "image 0.png").rename(folder / "a" / "image \udcff.png")
    except OSError:
        pytest.skip("this file system takes only text as names")
    training = open_splits(folder, valid_fraction=0).training
    assert contents(training, ("a", "b")) == expected({"a": 2, "b": 2})
    training.fingerprint()
    (folder / "b").rename(folder / "b\udcff")
    with pytest.raises(ValueError, match=r"the name of the class 'b\\udcff' is not Unicode"):
        open_splits(folder)


# ---- dividing -----------------------------------------------------------------------------------


def labels_of(dataset: Dataset) -> Counter[int]:
    return Counter(dataset.labels.tolist())


@pytest.mark.parametrize(
    ("fraction", "held_out"),
    [(0, []), (0.001, [1, 1]), (0.1, [1, 1]), (0.35, [4, 2]), (0.999, [9, 5])],
)
def test_each_class_is_held_out_by_the_fraction(
    tmp_path: Path, fraction: float, held_out: list[int]
) -> None:
    splits = open_splits(write_folder(tmp_path / "data"), valid_fraction=fraction)
    assert labels_of(splits.validation) == {i: n for i, n in enumerate(held_out) if n}
    assert labels_of(splits.training)[2] == 1  # the only one of its class is trained on
    assert everything(splits) == expected()


def test_seed_decides_what_is_held_out_and_drawn(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")

    def names(seed: int) -> tuple[list[str], list[str]]:
        splits = open_splits(folder, valid_fraction=0.4, per_class=3, seed=seed)
        return splits.training.names, splits.validation.names

    assert names(0) == names(0)
    assert len({str(names(seed)[0]) for seed in range(5)}) > 1
    assert len({str(names(seed)[1]) for seed in range(5)}) > 1


def test_few_shot(tmp_path: Path) -> None:
    splits = open_splits(write_folder(tmp_path / "data"), valid_fraction=0.4, per_class=3)
    assert labels_of(splits.training) == {0: 3, 1: 3, 2: 1}
    assert labels_of(splits.validation) == {0: 4, 1: 2}
    everything(splits)  # nothing is in both
    assert [
        n
        for n in splits.notes
        if n == "classes with fewer than 3 training images: empty handed (1)"
    ]


def test_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    write_folder(tmp_path / "elsewhere")

    def fingerprint(data: Path = folder, **options: Any) -> str:
        return open_splits(data, **options).training.fingerprint()

    found = [fingerprint(), fingerprint(seed=1), fingerprint(per_class=2)]
    assert fingerprint(tmp_path / "elsewhere") == found[0]
    with (folder / "class 9" / "image 0.png").open("ab") as file:
        file.write(b"more")
    found.append(fingerprint(valid_fraction=0))
    (folder / "class 9" / "image 0.png").rename(folder / "class 9" / "image 00.png")
    found.append(fingerprint(valid_fraction=0))
    assert len(set(found)) == len(found)


# ---- what is wrong ------------------------------------------------------------------------------


def test_images_that_are_none_are_reported(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "class 9" / "empty.png").write_bytes(b"")
    (folder / "class 9" / "text.jpg").write_text("text")
    (folder / "class 9" / "link.png").symlink_to("nowhere")
    seen: list[tuple[int, int]] = []
    splits = open_splits(folder, progress=lambda done, total: seen.append((done, total)))
    assert everything(splits) == expected()
    assert sorted(splits.problems) == [
        ("class 9/empty.png", "the file is empty"),
        ("class 9/link.png", "No such file or directory"),
        ("class 9/text.jpg", "not an image that Pillow can read"),
    ]
    assert seen[-1] == (20, 20)


def test_class_without_a_readable_image_is_noted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "empty handed" / "image 0.png").write_bytes(b"")
    splits = open_splits(folder)
    assert splits.classes[2] == "empty handed"
    assert "classes without a training image: empty handed" in splits.notes


def write_csv(folder: Path, *rows: str) -> Path:
    path = folder / "data.csv"
    path.write_text("\n".join(rows))
    return path


def test_the_same_file_twice(tmp_path: Path) -> None:
    write_folder(tmp_path / "x")
    rows = [
        "path,label",
        "x/class 9/image 0.png,a",
        "x/class 9/image 1.png,b",
        "./x/class 9/image 0.png,a",
    ]
    splits = open_splits(write_csv(tmp_path, *rows))
    assert len(splits.training) == 2
    assert [
        note for note in splits.notes if note.startswith("images that come twice, used once: 1,")
    ]
    with pytest.raises(ValueError, match=r"image 0\.png has different labels: 'a' and 'b'"):
        open_splits(write_csv(tmp_path, *rows, "x/class 9/image 0.png,b"))


def test_rows_without_a_path(tmp_path: Path) -> None:
    """They are not one file with two labels."""
    write_folder(tmp_path / "images", {"a": 1, "b": 1})
    images = [f"images/{name}/image 0.png,{name}" for name in "ab"]
    splits = open_splits(write_csv(tmp_path, "path,label", ",a", *images, ",b"))
    assert len(splits.training) == 2
    assert [problem.reason for problem in splits.problems] == ["no path", "no path"]
    assert splits.notes == []


def test_what_is_for_validation_is_not_trained_on(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x")
    valid = write_csv(tmp_path, "path,label", "x/class 9/image 0.png,class 9")
    splits = open_splits(folder, valid=valid)
    assert everything(splits) == expected()
    assert "images for validation as well, not trained on: 1" in splits.notes
    with pytest.raises(ValueError, match="no training image left"):
        open_splits(folder, valid=folder)


def test_validation_of_unknown_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x")
    valid = write_csv(
        tmp_path, "path,label", "x/class 9/image 0.png,cat", "x/class 9/image 1.png,dog"
    )
    with pytest.raises(ValueError, match=r"data\.csv: validation has classes .*: 'cat', 'dog'"):
        open_splits(folder, valid=valid)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["path,label"], "at least two classes are needed, got none"),
        (["path,label", "a.png,"], "at least two classes are needed, got none"),
        (["path,label", "a.png,x", "b.png,x"], "at least two classes are needed, got only 'x'"),
        (["path,label", "a.png,x", "b.png,y"], "no training image left: a.png: No such file"),
        (["path,label", "a.png,x", "b.png"], "line 3: 2 values are expected, got 1"),
        (
            ["path,label", "https://x.org/a.png,x", "b.png,y"],
            "local files, got the address 'https:",
        ),
        (
            ["path,kind", "a.png,x"],
            "no column of labels; one must be named label or .* has path, kind",
        ),
        (["where,label", "a.png,x"], "no column of images"),
        (["path,label,split", "a.png,x,dev", "b.png,y,dev"], "'split' must hold 'train', got dev"),
        ([""], "no column of images.*; it has none"),
    ],
)
def test_useless_tables(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_splits(write_csv(tmp_path, *rows))


def test_useless_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_splits(tmp_path / "none")
    with pytest.raises(ValueError, match="has no folder per class"):
        open_splits(tmp_path)
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(ValueError, match=r"data\.txt must be a folder with"):
        open_splits(tmp_path / "data.txt")
    (tmp_path / "data.parquet").write_text("no")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        open_splits(tmp_path / "data.parquet")
    (tmp_path / "data.csv").write_bytes(b"path,label\n\xff\xfe,\n")
    with pytest.raises(ValueError, match="is not a readable CSV file in UTF-8"):
        open_splits(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [1, 2], "label": ["a", "b"]},
            "images in 'image' must be paths, bytes or structs",
        ),
        ({"path": ["a", "b"], "label": [0.5, 1.5]}, "labels in 'label' must be text or integers"),
    ],
)
def test_useless_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=message):
        open_splits(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction must be from 0 to below 1, got 1.0"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_splits(write_folder(tmp_path / "data"), **options)


def test_validation_without_an_image(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x")
    with pytest.raises(ValueError, match=r"no image for validation: none\.png: No such file"):
        open_splits(folder, valid=write_csv(tmp_path, "path,label", "none.png,class 9"))
