"""Broken and hostile checkpoints: an error that names file and reason; nothing runs, nothing loads."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import tarfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig
from bitfast.modeling import BitModel

CONFIG = BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    BitModel(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    BitModel(CONFIG).save_pretrained(folder, max_shard_size=5000)
    return folder


def assert_refused(folder: Path, file: str, *reasons: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        BitModel.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert file in message
    for reason in reasons:
        assert reason in message
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_safetensors(checkpoint: Path, share: float) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(checkpoint, "model.safetensors", "not a valid safetensors file")


@pytest.mark.parametrize("length", [0, 1, 100, 10**6, 2**40, 2**63, 2**64 - 1])
def test_header_that_lies_about_its_size(checkpoint: Path, length: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert_refused(checkpoint, "model.safetensors", "not a valid safetensors file")


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [begin, end], **changes}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 16), "b": entry(8, 24)},
        {"a": entry(0, 16), "b": entry(16, 48)},
        {"a": entry(0, 16), "b": entry(20, 36)},
        {"a": entry(16, 0), "b": entry(16, 32)},
        {"a": entry(-16, 0), "b": entry(0, 32)},
        {"a": entry(0, 32, shape=[2**62, 4])},
        {"a": entry(0, 32, shape=[-8])},
        {"a": entry(0, 32, shape=[8], dtype="PICKLE")},
        {"a": entry(0, 32, shape="8")},
        {"a": {"dtype": "F32", "shape": [8]}},
        {"a": entry(0, 32, shape=[8]), "__metadata__": {"format": "tf"}},
        ["a"],
    ],
    ids=str,
)
def test_header_that_lies_about_the_tensors(checkpoint: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    assert_refused(checkpoint, "model.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_noticed_or_harmless(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / "model.safetensors"
    original = path.read_bytes()
    content = bytearray(original)
    header_size = 8 + struct.unpack("<Q", content[:8])[0]
    for position in data.draw(st.lists(st.integers(0, header_size - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    # A new file: the mapped memory of tensors loaded before belongs to the old one.
    path.unlink()
    path.write_bytes(content)
    message, dtypes = str(checkpoint), {torch.float32}
    try:
        dtypes = {tensor.dtype for tensor in BitModel.from_pretrained(checkpoint).parameters()}
    except (CheckpointError, RuntimeError) as error:
        message = str(error)
    path.unlink()
    path.write_bytes(original)
    assert str(checkpoint) in message
    assert dtypes == {torch.float32}


class Payload:
    """Creates a file where it is unpickled by something that executes what it reads."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_pickle_in_zip(content: Any, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3")


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle, save_pickle_in_zip])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "shard"])
def test_code_in_a_pickle_is_not_run(
    checkpoint: Path, save: Callable[[Any, Path], None], name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    # The payload does what it is for, where it is run.
    pickle.loads(pickle.dumps(Payload(marker)))
    marker.rmdir()
    (checkpoint / "model.safetensors").unlink()
    if name == "shard":
        name = "pytorch_model-00001-of-00001.bin"
        index = {"weight_map": {"norm.weight": name}}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save({"norm.weight": torch.ones(32), "norm.bias": Payload(marker)}, checkpoint / name)
    assert_refused(checkpoint, name)
    assert not marker.exists()


def save_torchscript(content: Any, path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


def save_nonsense(content: Any, path: Path) -> None:
    path.write_bytes(b"\x80\x02x nothing that a pickle holds")


def save_tar(content: Any, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (save_zip, "holds Python objects (posix.mkdir)"),
        (save_legacy, "holds Python objects (posix.mkdir)"),
        (save_pickle, "holds Python objects (posix.mkdir)"),
        (save_pickle_in_zip, "holds Python objects (posix.mkdir)"),
        (save_torchscript, "TorchScript archive, which holds code"),
        (save_nonsense, "is broken, or holds Python objects"),
        (save_tar, "nothing else is loaded: it"),
    ],
)
def test_nobody_is_told_how_to_run_the_code_in_a_file(
    checkpoint: Path, save: Callable[[Any, Path], None], reason: str, tmp_path: Path
) -> None:
    """torch's errors advise ``weights_only=False``; neither the message nor the traceback repeats that."""
    (checkpoint / "model.safetensors").unlink()
    save({"norm.weight": Payload(tmp_path / "executed")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        BitModel.from_pretrained(checkpoint)
    printed = "".join(traceback.format_exception(caught.value))
    assert "CheckpointError" in printed
    assert "torch.load" not in printed  # nor its own error, chained
    for advice in ("weights_only", "safe_globals", "allowlist", "likely succeed"):
        assert advice not in printed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"norm.weight": torch.ones(32), "step": 7}, "'step', which is not a plain tensor"),
        ({"state_dict": {"norm.weight": torch.ones(32)}}, "'state_dict', which is not a plain"),
        ({"norm.weight": torch.ones(32).to_sparse()}, "'norm.weight', which is not a plain tensor"),
        ({3: torch.ones(32)}, "the key 3"),
        ([torch.ones(32)], "must hold a dictionary, got list"),
        (torch.ones(32), "must hold a dictionary, got Tensor"),
    ],
)
def test_pytorch_file_of_something_else(checkpoint: Path, content: Any, reason: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert_refused(checkpoint, "pytorch_model.bin", reason)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_pytorch_file(checkpoint: Path, share: float) -> None:
    (checkpoint / "model.safetensors").unlink()
    BitModel(CONFIG).save_pretrained(checkpoint, safe_serialization=False)
    path = checkpoint / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(checkpoint, "pytorch_model.bin", "not a PyTorch file")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_cannot_be_parameters(checkpoint: Path, dtype: torch.dtype) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"norm.weight": torch.ones(32, dtype=dtype)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"norm\.weight is torch\."):
        BitModel.from_pretrained(checkpoint)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    content = json.loads(path.read_text())
    replaced = change(content)
    path.write_text(json.dumps(content if replaced is None else replaced))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.safetensors", "outside the folder"),
        ("sub/../../secret.safetensors", "outside the folder"),
        ("{parent}/secret.safetensors", "outside the folder"),
        ("..\\secret.safetensors", "outside the folder"),
        ("link.safetensors", "a link to outside"),
        ("linked_folder/secret.safetensors", "a link to outside"),
        ("missing.safetensors", "missing"),
        ("secret\0.safetensors", ""),
        ("model.bin", "not a .safetensors file"),
        ("", "not a .safetensors file"),
        (7, "not a .safetensors file"),
        (None, "not a .safetensors file"),
        (["a"], "not a .safetensors file"),
    ],
)
def test_index_that_names_other_files(sharded: Path, name: Any, reason: str) -> None:
    secret = sharded.parent / "secret.safetensors"
    save_file({"norm.weight": torch.full((32,), 7.0)}, secret)
    (sharded / "link.safetensors").symlink_to(secret)
    (sharded / "linked_folder").symlink_to(sharded.parent)
    if isinstance(name, str):
        name = name.replace("{parent}", str(sharded.parent))
    edit_index(sharded, lambda index: index["weight_map"].update({"norm.weight": name}))
    assert_refused(sharded, "", reason)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.clear(),
        lambda index: index.update(weight_map=[]),
        lambda index: index.update(weight_map={}),
        lambda index: index.update(weight_map="model.safetensors"),
        lambda index: ["not", "an", "object"],
    ],
)
def test_index_without_a_weight_map(sharded: Path, change: Callable[[Any], Any]) -> None:
    edit_index(sharded, change)
    assert_refused(sharded, INDEX)


def test_index_that_promises_a_tensor_too_many(sharded: Path) -> None:
    edit_index(
        sharded,
        lambda index: index["weight_map"].update(extra=index["weight_map"]["norm.bias"]),
    )
    assert_refused(sharded, INDEX, "lacks the tensor 'extra'")


def test_missing_and_broken_shards(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    assert_refused(sharded, shard.name, "not a valid safetensors file")
    shard.unlink()
    assert_refused(sharded, shard.name, INDEX, "missing")


def test_index_and_links_inside_the_folder_are_fine(sharded: Path) -> None:
    expected = BitModel.from_pretrained(sharded).state_dict()
    (sharded / "shards").mkdir()
    for shard in sharded.glob("model-*.safetensors"):
        shard.rename(sharded / "shards" / shard.name)
        shard.symlink_to(Path("shards", shard.name))
    loaded = BitModel.from_pretrained(sharded).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "dpt"}, "'dpt'"),
        ({"hidden_sizes": [-16, 32]}, "hidden_sizes"),
        ({"num_groups": 0}, "num_groups"),
        ({"dtype": "int512"}, "dtype"),
        ({"num_labels": -3, "id2label": None}, "num_labels"),
    ],
)
def test_wrong_configuration(checkpoint: Path, change: dict[str, Any], reason: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(checkpoint, "config.json", reason)


def test_contradicting_names(checkpoint: Path) -> None:
    from bitfast.modeling import BitForImageClassification

    state = {**BitModel(CONFIG).state_dict(), "classifier.1.weight": torch.ones(2, 32)}
    save_file(state, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"classifier\.1\.weight"):
        BitForImageClassification.from_pretrained(checkpoint)


def test_folder_without_weights_and_file_instead_of_folder(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        BitModel.from_pretrained(weights, config=CONFIG)
    weights.unlink()
    assert_refused(checkpoint, "pytorch_model.bin.index.json", "found no weights")
