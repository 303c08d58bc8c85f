"""What else users of transformers' image processors call: members, configuration files, code on the Hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_processing_utils_fast import BaseImageProcessorFast
from transformers.models.bit.image_processing_bit import BitImageProcessor as TheirSlow
from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as TheirFast

import bitfast
from bitfast import BitImageProcessor, BitImageProcessorFast, CheckpointError

BOTH = [(BitImageProcessor, TheirSlow), (BitImageProcessorFast, TheirFast)]

LEFT_OUT = {
    "_create_repo",  # these three are how theirs uploads; push_to_hub is there
    "_get_files_timestamps",
    "_upload_modified_files",
    "compile_friendly_resize",  # goes round a fault of torch.compile on AMD's MI300
}

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_members(ours: Any, theirs: Any) -> None:
    members = {
        name for name in dir(theirs()) if not name.endswith("__") and "__backends" not in name
    }
    assert members - set(dir(ours())) <= LEFT_OUT


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_get_image_processor_dict(ours: Any, theirs: Any, tmp_path: Path) -> None:
    ours(size=77, tag=3).save_pretrained(tmp_path / "in")
    options = {"subfolder": "in", "revision": None, "size": 5, "foo": 1, "local_files_only": True}
    found, unused = ours.get_image_processor_dict(tmp_path, **options)
    expected, their_unused = theirs.get_image_processor_dict(tmp_path / "in", size=5, foo=1)
    assert found == expected
    assert unused == their_unused == {"size": 5, "foo": 1}
    (tmp_path / "in" / "preprocessor_config.json").rename(tmp_path / "other.json")
    for where in ({"image_processor_filename": "other.json"}, {"proxies": {}, "_from_auto": True}):
        path = tmp_path if "proxies" not in where else tmp_path / "other.json"
        expected, _ = theirs.get_image_processor_dict(path, **where)
        assert ours.get_image_processor_dict(path, **where) == (expected, {})
    with pytest.raises(CheckpointError, match=r"contains no file none\.json"):
        ours.get_image_processor_dict(tmp_path, image_processor_filename="none.json")
    loaded = ours.from_pretrained(tmp_path, image_processor_filename="other.json")
    assert loaded.size == {"shortest_edge": 77}


@pytest.mark.parametrize("base", [BitImageProcessor, BitImageProcessorFast])
def test_from_pretrained_asks_a_subclass_for_the_dictionary(base: Any, tmp_path: Path) -> None:
    class Elsewhere(base):
        @classmethod
        def get_image_processor_dict(cls, name: Any, **kwargs: Any) -> Any:
            return {"size": 31, "crop_size": int(name)}, {**kwargs, "do_rescale": False}

    processor = Elsewhere.from_pretrained("13")
    assert (processor.size, processor.do_rescale) == ({"shortest_edge": 31}, False)
    assert processor.crop_size == {"height": 13, "width": 13}


CODE = """
from bitfast import {base}

class Darker({base}):
    def rescale(self, image, scale, **kwargs):
        return super().rescale(image, scale / 2, **kwargs)
"""


@pytest.mark.parametrize("base", ["BitImageProcessor", "BitImageProcessorFast"])
@pytest.mark.parametrize("auto_class", ["AutoImageProcessor", transformers.AutoImageProcessor])
def test_a_class_of_ones_own_is_saved_with_its_code(
    base: str, auto_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_path = tmp_path / f"darker_{base.lower()}.py"
    module_path.write_text(CODE.format(base=base))
    spec = importlib.util.spec_from_file_location(module_path.stem, module_path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module_path.stem, module)
    spec.loader.exec_module(module)
    module.Darker.register_for_auto_class(auto_class)
    assert module.Darker._auto_class == "AutoImageProcessor"
    processor = module.Darker(size=44, do_normalize=False)
    processor.save_pretrained(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files == {"preprocessor_config.json", module_path.name}
    content = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert content["auto_map"] == {"AutoImageProcessor": f"{module_path.stem}.Darker"}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    loaded = transformers.AutoImageProcessor.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    assert type(loaded).__name__ == "Darker"
    a, b = (p(IMAGE, return_tensors="pt").pixel_values for p in (processor, loaded))
    assert torch.equal(a, b)
    plain = getattr(sys.modules["bitfast"], base)(size=44, do_normalize=False)
    assert torch.allclose(2 * a, plain(IMAGE, return_tensors="pt").pixel_values, rtol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_registering_for_what_is_no_auto_class(ours: Any, theirs: Any) -> None:
    for cls in (ours, theirs):
        with pytest.raises(ValueError, match="AutoPainter"):
            cls.register_for_auto_class("AutoPainter")
        assert cls._auto_class is None


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_the_class_of_a_whole_processor_is_kept(ours: Any, theirs: Any, tmp_path: Path) -> None:
    for processor in (ours(), theirs()):
        processor._set_processor_class("PhotoProcessor")
        assert json.loads(processor.to_json_string())["processor_class"] == "PhotoProcessor"
        processor.save_pretrained(tmp_path)
        assert ours.from_pretrained(tmp_path)._processor_class == "PhotoProcessor"


@pytest.mark.parametrize(
    ("ours", "base"),
    [(BitImageProcessor, BaseImageProcessor), (BitImageProcessorFast, BaseImageProcessorFast)],
)
def test_a_class_of_both_libraries(ours: Any, base: Any, tmp_path: Path) -> None:
    both = type(ours.__name__, (ours, base), {})
    processor = both(size=30, crop_size=25, extra=[1], processor_class="P")
    alone = ours(size=30, crop_size=25, extra=[1], processor_class="P")
    assert isinstance(processor, base)
    assert processor.is_fast == alone.is_fast
    assert processor.to_json_string() == alone.to_json_string()
    a, b = (p(IMAGE, return_tensors="pt").pixel_values for p in (processor, alone))
    assert torch.equal(a, b)
    processor.save_pretrained(tmp_path)
    assert both.from_pretrained(tmp_path).to_dict() == processor.to_dict()


@pytest.mark.parametrize("name", ["image_processing", "image_processing_fast"])
def test_the_modules_that_users_import_from(name: str) -> None:
    module = importlib.import_module(f"bitfast.{name}")
    assert all(getattr(module, each) is getattr(bitfast, each) for each in module.__all__)
