"""Which images ``bitfast embed`` takes, in which order, and under which names."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfast.embedding.inputs import Item, expand_ranges, find_items, read_item, read_list
from tests.cli.common import Run
from tests.embedding.common import (
    SUFFIXES,
    png,
    read_failures,
    read_vectors,
    save_pictures,
    save_shard,
)

ODD_NAMES = ["a b.png", "new\nline.png", "ünï\u2028.png", '"comma", quote.png', "[x].png"]


def names_of(arguments: list[object]) -> list[str]:
    items = find_items([str(argument) for argument in arguments])
    assert [item.problem for item in items] == [None] * len(items)
    return [item.name for item in items]


# ---- ranges and lists ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{002..000}", ["002", "001", "000"]),
        ("{0..1}/{4..5}", ["0/4", "0/5", "1/4", "1/5"]),
        ("{7..7}", ["7"]),
        ("{a..b}.tar", ["{a..b}.tar"]),
        ("{1,2}.tar", ["{1,2}.tar"]),
    ],
)
def test_ranges(argument: str, names: list[str]) -> None:
    assert expand_ranges(argument) == names


def test_a_file_that_is_called_like_a_range(tmp_path: Path) -> None:
    (tmp_path / "{1..2}.png").touch()
    assert expand_ranges(f"{tmp_path}/{{1..2}}.png") == [f"{tmp_path}/{{1..2}}.png"]


@pytest.mark.parametrize(
    "argument", ["{0..1000000}", "{0..999}{0..1000}", "{1..9" + 60 * "9" + "}"]
)
def test_too_large_ranges(argument: str) -> None:
    with pytest.raises(ValueError, match=r"stands for \d+ names; at most 1000000"):
        expand_ranges(argument)


def test_a_list_of_a_windows_editor(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfa.png\r\nb.png\r\n")
    assert read_list(str(tmp_path / "list")) == ["a.png", "b.png"]


def test_a_list_in_utf_16(tmp_path: Path, model: Path, run: Run) -> None:
    listed = tmp_path / "list"
    listed.write_bytes("a.png\n".encode("utf-16"))
    status, _, err = run(
        "embed", "--list", listed, "--output", tmp_path / "o.npy", "--model", model
    )
    assert status == 2
    assert err.startswith(
        f"bitfast: error: --list: '{listed}' cannot be read: it is no text in UTF"
    )


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"one.png\r\n\n two .png\n\xff.png"
    names = ["one.png", " two .png", "\udcff.png"]
    (tmp_path / "list").write_bytes(content)
    assert read_list(str(tmp_path / "list")) == names
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_list("-") == names


def test_the_order_is_that_of_the_arguments(tmp_path: Path, model: Path, run: Run) -> None:
    a, b = save_pictures(tmp_path / "a", 2), save_pictures(tmp_path / "b", 3)
    shard = save_shard(tmp_path / "s.tar", {"z.png": png(), "y.png": png()})
    listed = tmp_path / "list"
    listed.write_text(f"{a[1]}\n{tmp_path}/s.tar\n{tmp_path}/a\n")
    output = tmp_path / "out.npy"
    arguments = ["embed", f"{tmp_path}/b/*.png", "--list", listed, "--output", output]
    assert run(*arguments, "--model", model, "--batch-size", "2")[0] == 0
    names, _ = read_vectors(output)
    assert names == [*map(str, b), str(a[1]), f"{shard}/z.png", f"{shard}/y.png", str(a[0])]


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names(tmp_path: Path, model: Path, run: Run, suffix: str) -> None:
    folder = tmp_path / "odd"
    paths = save_pictures(folder, len(ODD_NAMES))
    for path, name in zip(paths, ODD_NAMES, strict=True):
        path.rename(folder / name)
    os.rename(save_pictures(folder, 1)[0], os.fsencode(folder) + b"/not-\xff-utf8.png")
    (folder / "broken\n\r,é.png").write_bytes(b"no image")
    output = tmp_path / f"out{suffix}"
    assert run("embed", folder, "--output", output, "--model", model)[0] == 1
    names, vectors = read_vectors(output)
    found = [*ODD_NAMES, "not-\udcff-utf8.png"]
    assert names == [f"{folder}/{name}".replace("\udcff", "\\xff") for name in sorted(found)]
    assert len(vectors) == len(names)
    assert list(read_failures(output)) == [f"{folder}/broken\n\r,é.png"]


# ---- tar shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members(tmp_path: Path, form: int) -> None:
    names = ["sample.jpg", "a/b/0001.left.PNG", "./é.webp"]
    if form != tarfile.USTAR_FORMAT:
        names.append("long/" + 30 * "0123456789" + ".png")
    content = {name: png() for name in names}
    others = {
        "0001.cls": b"3",
        "0001.json": b"{}",
        ".hidden.png": b"",
        "d/._0001.png": b"",
        "notes": b"",
    }
    path = save_shard(tmp_path / "s.tar", {**others, **content}, format=form)
    items = find_items([str(path)])
    assert [item.name for item in items] == [f"{path}/{name}" for name in names]
    for item, name in zip(items, names, strict=True):
        expected = Image.open(io.BytesIO(content[name]))
        assert np.array_equal(np.asarray(read_item(item)), np.asarray(expected))


def header(kind: bytes, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo()
    made.type, made.linkname = kind, link
    return made


def test_what_is_no_file_in_a_shard(tmp_path: Path) -> None:
    members = {
        "good.png": png(),
        "folder.png": header(tarfile.DIRTYPE),
        "hard.png": header(tarfile.LNKTYPE, "good.png"),
        "soft.png": header(tarfile.SYMTYPE, "/etc/passwd"),
        "pipe.png": header(tarfile.FIFOTYPE),
        "../../up.png": png(),
        "twice.png": png(),
    }
    path = save_shard(tmp_path / "s.tar", members)
    problems = {item.member: item.problem for item in find_items([str(path)])}
    link = "a link, which is not followed in an archive"
    assert problems == {
        "good.png": None,
        "hard.png": link,
        "soft.png": link,
        "pipe.png": "not a regular file",
        "../../up.png": None,  # a name and no more: nothing is ever written there
        "twice.png": None,
    }
    with pytest.raises(OSError, match="a link"):
        read_item(next(item for item in find_items([str(path)]) if item.member == "soft.png"))


def shard_of_three(path: Path) -> tuple[Path, list[int]]:
    """A shard, and where its members' contents begin."""
    save_shard(path, {f"{number}.png": png() for number in range(3)})
    return path, [item.offset for item in find_items([str(path)])]


@pytest.mark.parametrize(
    ("members", "end"),
    [(3, "in a member"), (2, "in a header"), (2, "before a header"), (3, "mark")],
)
def test_shards_that_are_cut_off(tmp_path: Path, members: int, end: str) -> None:
    path, begins = shard_of_three(tmp_path / "s.tar")
    content = path.read_bytes()
    ends = {
        "in a member": begins[2] + 100,
        "in a header": begins[2] - 100,
        "before a header": begins[2] - 512,
        "mark": len(content.rstrip(b"\0")) // 512 * 512 + 512,
    }
    path.write_bytes(content[: ends[end]])
    *items, last = find_items([str(path)])
    assert [item.problem for item in items] == [None] * members
    assert last.member is None
    assert last.problem is not None
    assert last.problem.startswith("the archive is broken: ")


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    path, begins = shard_of_three(tmp_path / "s.tar")
    content = bytearray(path.read_bytes())
    content[begins[1] - 512] ^= 1
    path.write_bytes(content)
    first, last = find_items([str(path)])
    assert (first.member, first.problem) == ("0.png", None)
    assert last == Item(
        str(path), problem="the archive is broken: it is cut off, or a header in it is damaged"
    )


def test_negative_sizes_end(tmp_path: Path) -> None:
    """Some versions of tarfile go round in circles."""
    path, begins = shard_of_three(tmp_path / "s.tar")
    content = bytearray(path.read_bytes())
    at = begins[1] - 512
    content[at + 124 : at + 136] = b"\xff" * 4 + (-1024).to_bytes(8, "big", signed=True)
    content[at + 148 : at + 156] = b" " * 8
    checksum = sum(content[at : at + 512])
    content[at + 148 : at + 156] = f"{checksum:06o}\0 ".encode()
    path.write_bytes(content)
    assert find_items([str(path)])[-1].problem is not None


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("s.tar", b"", "the archive is broken: empty file"),
        ("s.tar", b"no archive" * 100, "the archive is broken: "),
        ("s.tar", bytes(1024), "the archive holds no image files"),
        ("s.tar.gz", b"", "a compressed archive; only .tar itself is read"),
        ("S.TGZ", b"", "a compressed archive; only .tar itself is read"),
    ],
)
def test_what_is_no_shard(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    (item,) = find_items([str(tmp_path / name)])
    assert item.problem is not None
    assert item.problem.startswith(problem)


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    (item,) = find_items([str(tmp_path / "s.tar")])
    assert item.problem == "the archive is broken: not a regular file"


def test_shards_in_a_range(tmp_path: Path, model: Path, run: Run) -> None:
    for number in (8, 9, 11):
        save_shard(tmp_path / f"s-{number:03}.tar", {"a.png": png(), "b.png": png()})
    (tmp_path / "s-011.tar").write_bytes((tmp_path / "s-011.tar").read_bytes()[:-9000])
    output = tmp_path / "out.parquet"
    status, _, err = run(
        "embed", f"{tmp_path}/s-{{008..011}}.tar", "--output", output, "--model", model
    )
    assert status == 1
    names, _ = read_vectors(output)
    assert names[:4] == [f"{tmp_path}/s-00{n}.tar/{m}.png" for n in (8, 9) for m in "ab"]
    failures = read_failures(output)
    assert failures[f"{tmp_path}/s-010.tar"] == "no such file or folder"
    assert failures[f"{tmp_path}/s-011.tar"].startswith("the archive is broken")
    assert f"listed in {output}.failed.csv" in err


def test_a_shard_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path, _ = shard_of_three(tmp_path / "s.tar")
    *_, last = find_items([str(path)])
    path.write_bytes(path.read_bytes()[: last.offset + 10])
    with pytest.raises(OSError, match="the archive has been cut off"):
        read_item(last)
