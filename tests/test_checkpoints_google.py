"""Google's npz files: the same logits as timm makes of them, and a clear answer to what is none."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitfast.checkpoints import google
from bitfast.checkpoints.architecture import infer_architecture
from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig
from bitfast.modeling import BitBackbone, BitForImageClassification, BitModel
from tests.foreign_checkpoints import (
    assert_as_timm,
    google_arrays,
    released_model,
    save_npz,
    timm_model,
)
from tests.model_pairs import assert_close

Arrays = dict[str, np.ndarray]

BLOCK = "resnet/block1/unit01"


def load(path: Path, dtype: torch.dtype) -> Any:
    return BitForImageClassification.from_pretrained(path, dtype=dtype)


# ---- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": (2, 1, 11, 1), "width_factor": 2},
        {"in_chans": 1, "num_classes": 1, "stem_chs": 96},
        {"num_classes": 21843},
    ],
    ids=str,
)
def test_logits_are_those_of_timm(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save_npz(tmp_path / "BiT-M-R50x1.npz", google_arrays(timm_model(**changes)))
    theirs = timm_model(**changes)
    theirs.load_pretrained(str(path))  # timm reads the same file
    assert_as_timm(partial(load, path), theirs.eval())
    model, info = BitForImageClassification.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    assert all(parameter.is_contiguous() for parameter in model.state_dict().values())
    assert model.config.depths == [len(stage.blocks) for stage in theirs.stages]
    assert model.config.num_labels == theirs.num_classes


def test_models_without_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = timm_model(num_classes=0)
    path = save_npz(tmp_path / "a.npz", google_arrays(model))
    images = torch.randn(2, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        final, features = model.double().forward_intermediates(images)
        output = BitModel.from_pretrained(path, dtype=torch.float64)(images)
        assert_close(output.last_hidden_state, final)
        backbone = BitBackbone.from_pretrained(path, dtype=torch.float64, out_indices=[1, 4])
        assert_close(backbone(images).feature_maps, (features[1], features[4]))
    assert not caplog.records
    BitForImageClassification.from_pretrained(path)
    assert "Newly initialised" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_precisions_and_orders_of_bytes(tmp_path: Path, dtype: str) -> None:
    arrays = {name: array.astype(dtype) for name, array in google_arrays(timm_model()).items()}
    model = BitForImageClassification.from_pretrained(
        save_npz(tmp_path / "a.npz", arrays), dtype="auto"
    )
    assert model.dtype == {"float16": torch.float16, "float64": torch.float64}.get(
        dtype, torch.float32
    )
    kernel = arrays["resnet/root_block/standardized_conv2d/kernel"].astype(np.float64)
    assert np.array_equal(
        model.bit.embedder.convolution.weight.detach().double().numpy(),
        kernel.transpose(3, 2, 0, 1),
    )


def test_compressed_archives_and_columns_first(tmp_path: Path) -> None:
    model = timm_model()
    arrays = {name: np.asfortranarray(array) for name, array in google_arrays(model).items()}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    assert_as_timm(partial(load, tmp_path / "a.npz"), model)


def test_another_number_of_labels(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", google_arrays(timm_model()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BitForImageClassification.from_pretrained(path, num_labels=4)
    model = BitForImageClassification.from_pretrained(
        path, num_labels=4, ignore_mismatched_sizes=True
    )
    assert model.config.num_labels == 4


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    model = timm_model()
    path = save_npz(tmp_path / "a.npz", google_arrays(model))
    load(path, torch.float32).save_pretrained(tmp_path / "saved")
    theirs = transformers.BitForImageClassification.from_pretrained(tmp_path / "saved").double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(theirs(images).logits, model.double()(images))


def test_arrays_outside_of_the_network_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = {**google_arrays(timm_model()), "global_step": np.array(7)}
    with caplog.at_level(logging.WARNING):
        load(save_npz(tmp_path / "a.npz", arrays), torch.float32)
    assert "not used, as no part of the network: global_step" in caplog.text


@pytest.mark.parametrize("num_classes", [1000, 21843])
@pytest.mark.parametrize("architecture", timm.list_models("resnetv2_*_bit"))
def test_the_architecture_of_every_released_file(architecture: str, num_classes: int) -> None:
    with torch.device("meta"):
        shapes = {
            google._their_name(name): tuple(parameter.shape)
            for name, parameter in released_parameters(architecture, num_classes).items()
        }
    found = infer_architecture(shapes, google.SCHEME, "file")
    assert f"resnetv2_{found.variant}_bit" == architecture
    assert found.num_labels == num_classes
    assert "resnet/block1/unit01/a/proj/standardized_conv2d/kernel" in shapes
    assert ("resnet/block3/unit36/c/group_norm/gamma" in shapes) == ("152x" in architecture)


def released_parameters(architecture: str, num_classes: int) -> dict[str, torch.Tensor]:
    from bitfast.checkpoints import timm as timm_format

    model = released_model(architecture, num_classes)
    found, _ = timm_format.convert(model.state_dict(), architecture)
    return {name: torch.empty(shape, device="meta") for name, shape in found.shapes().items()}


# ---- what is no BiT checkpoint ------------------------------------------------------------------


def assert_refused(path: Path, *said: str) -> None:
    for load_it in (BitForImageClassification, BitModel, BitConfig):
        with pytest.raises(CheckpointError) as caught:
            load_it.from_pretrained(path)
        for part in (str(path), *said):
            assert part in str(caught.value)


def remove(name: str) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.pop(name)


def change(name: str, array: Any) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.update({name: np.asarray(array)})


def rename(old: str, new: str) -> Callable[[Arrays], Any]:
    def apply(arrays: Arrays) -> None:
        content = {name.replace(old, new): array for name, array in arrays.items()}
        arrays.clear()
        arrays.update(content)

    return apply


KERNEL = "standardized_conv2d/kernel"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove(f"resnet/root_block/{KERNEL}"), f"lacks resnet/root_block/{KERNEL}"),
        (remove("resnet/group_norm/beta"), "lacks resnet/group_norm/beta"),
        (remove("resnet/head/conv2d/bias"), "lacks resnet/head/conv2d/bias"),
        (remove(f"{BLOCK}/a/proj/{KERNEL}"), f"lacks {BLOCK}/a/proj/{KERNEL}"),
        (remove(f"{BLOCK}/c/{KERNEL}"), f"lacks {BLOCK}/c/{KERNEL}"),
        (remove(f"{BLOCK}/b/group_norm/gamma"), f"lacks {BLOCK}/b/group_norm/gamma"),
        (rename("resnet/", ""), "no name starts with 'resnet/'; it has root_block"),
        (rename("resnet/", "model/"), "no name starts with 'resnet/'"),
        (rename("block4", "block5"), "its stages are numbered 1, 2, 3, 5"),
        (rename("unit02", "unit04"), "blocks in stage 2 are numbered 1, 4"),
        (rename("unit01", "unit1"), "lacks resnet/block1/unit01"),
        (rename("block", "bottle"), "it has no resnet/block1/unit01/a"),
        (change(f"{BLOCK}/d/{KERNEL}", [1.0]), f"{BLOCK}/d/{KERNEL}, for which there is no place"),
        (change(f"resnet/block2/unit02/a/proj/{KERNEL}", [1.0]), "for which there is no place"),
        (change("resnet/head/linear/kernel", [1.0]), "for which there is no place"),
        (change(f"{BLOCK}/b/{KERNEL}", np.zeros((1, 1, 32, 32))), "and should be (32, 32, 3, 3)"),
        (change(f"{BLOCK}/c/{KERNEL}", np.zeros((1, 1, 24, 96))), "multiples of 128"),
        (change("resnet/head/conv2d/kernel", np.zeros((256, 7))), "must have four dimensions"),
        (change("resnet/head/conv2d/bias", np.zeros(8)), "resnet/head/conv2d/bias is (8,)"),
        (change("resnet/group_norm/beta", np.zeros(256, int)), "resnet/group_norm/beta is int64"),
        (
            change("resnet/group_norm/beta", np.zeros(256, "c8")),
            "complex64; expected one of float16",
        ),
        (change("resnet/group_norm/beta", np.zeros(256, "S1")), "is |S1"),
        (change("resnet/group_norm/beta", np.zeros(256, "f4,f4")), "expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_a_checkpoint(tmp_path: Path, damage: Any, said: str) -> None:
    arrays = google_arrays(timm_model())
    damage(arrays)
    assert_refused(save_npz(tmp_path / "a.npz", arrays), said)


class Trap:
    """Says so if it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("unpickled",)


@pytest.mark.parametrize("name", ["resnet/group_norm/beta", "anything"])
def test_objects_are_not_unpickled(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = google_arrays(timm_model())
    arrays[name] = np.array([Trap()], dtype=object)
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    assert_refused(path, f"{name}.npy", "never unpickled")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("trap", pickle.dumps(Trap()))
    assert_refused(path)
    path.write_bytes(pickle.dumps(Trap()))
    assert_refused(path, "not a readable npz file")
    assert "unpickled" not in capsys.readouterr().out


def member(shape: tuple[int, ...], content: bytes, dtype: str = "<f4") -> bytes:
    """Return an npy file whose header says ``shape``, whatever its content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + content


@pytest.mark.parametrize(
    "shape", [(2**30,), (2**60,), (2**40, 2**40), (-1,), (-1, -256), (255,), (257,), (0,)], ids=str
)
def test_headers_that_lie_about_the_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = google_arrays(timm_model())
    del arrays["resnet/group_norm/beta"]
    path = save_npz(tmp_path / "a.npz", arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("resnet/group_norm/beta.npy", member(shape, bytes(1024)))
    assert_refused(path, "resnet/group_norm/beta.npy", "and holds 1024")


def raw(content: bytes) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr("resnet/more.npy", content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("add", "said"),
    [
        (raw(b""), "not a readable npz file"),
        (raw(b"\x93NUMPY\x09\x00v\x00{}"), "unknown version (9, 0)"),
        (raw(b"\x93NUMPY\x01\x00\x05\x00{'a':"), "not a readable npz file"),
        (raw(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"), "not a readable npz file"),
        (raw(b"\x93NUMPY\x01\x00\x13\x00__import__('os')  \n"), "not a readable npz file"),
        (raw(member((1,), b"", "|V1000000000")), "claims 1000000000 bytes"),
        (lambda archive: archive.writestr("resnet/group_norm/beta.npy", b"x"), "is there twice"),
        (lambda archive: archive.writestr("README", b"x"), "'README' is no .npy array"),
        (lambda archive: archive.mkdir("folder"), "'folder/' is no .npy array"),
    ],
)
def test_members_that_are_no_arrays(tmp_path: Path, add: Any, said: str) -> None:
    path = save_npz(tmp_path / "a.npz", google_arrays(timm_model()))
    with zipfile.ZipFile(path, "a") as archive:
        add(archive)
    assert_refused(path, said)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    path = save_npz(tmp_path / "a.npz", google_arrays(timm_model()))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(path, "not a readable npz file")


def test_an_npy_file_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(member((4,), bytes(16)))
    assert_refused(path, "not a readable npz file")


def test_changed_numbers_are_noticed(tmp_path: Path) -> None:
    arrays = google_arrays(timm_model())
    path = save_npz(tmp_path / "a.npz", arrays)
    content = bytearray(path.read_bytes())
    at = content.find(arrays["resnet/group_norm/beta"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        BitModel.from_pretrained(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive of which headers make up a large share."""
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez_compressed(
        path, **{"resnet/group_norm/beta": np.zeros(4, np.float32), "b": np.zeros(2)}
    )
    return path


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_survived(archive: Path, data: st.DataObject) -> None:
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = archive.with_name("changed.npz")
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        BitModel.from_pretrained(path)


def test_a_size_that_the_archive_does_not_hold(tmp_path: Path) -> None:
    """The archive's directory and the header agree on a gigabyte that is not there."""
    arrays = google_arrays(timm_model())
    del arrays["resnet/group_norm/beta"]
    path = save_npz(tmp_path / "a.npz", arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("resnet/group_norm/beta.npy", member((2**28,), b""))
    content = bytearray(path.read_bytes())
    size = len(member((2**28,), b""))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.rfind(signature)
        assert struct.unpack_from("<I", content, at + offset) == (size,)
        struct.pack_into("<I", content, at + offset, size + 2**30)
    path.write_bytes(content)
    assert_refused(path, "resnet/group_norm/beta is (268435456,) and should be (256,)")
