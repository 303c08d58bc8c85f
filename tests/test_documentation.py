"""What the documentation shows works as it stands there, and its links lead somewhere.

Examples run on a local checkpoint and a photograph instead of what they name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import skimage
import torch
import transformers

import bitfast
import bitfast.transformers
from bitfast.cli import build_parser, main
from bitfast.digits import MODEL_PATH
from tests.foreign_checkpoints import google_arrays, save_folder, save_npz, timm_model
from tests.foreign_models import dpt_hybrid
from tests.model_pairs import our_model
from tests.picture_sets import digits, save_by_class

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
WITH_LINKS = [*PAGES, *(f"bench/{path.name}" for path in sorted((ROOT / "bench").glob("*.md")))]
MOST_LINES_OF_README = 150
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, text_of(page), flags=re.DOTALL | re.MULTILINE)


# ---- examples -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The Python example of a page that has this word in it."""

    page: str
    word: str

    @property
    def code(self) -> str:
        (block,) = [block for block in code_blocks(self.page, "python") if self.word in block]
        return block

    def run(self, files: dict[str, Path] | None = None, **names: Any) -> dict[str, Any]:
        """Run it with what is on this machine for what is not, and return its variables.

        Args:
            files: Paths by the names that the example gives them.
            names: What the example takes as given.
        """
        code = self.code
        for shown, path in (files or {}).items():
            assert f'"{shown}"' in code
            code = code.replace(f'"{shown}"', repr(str(path)))
        exec(code, names)
        return names


def runs(page: str, word: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate the test that runs an example, which is its argument."""
    example = Example(page, word)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test.example = example  # type: ignore[attr-defined]
        return pytest.mark.parametrize("example", [example], ids=[f"{page}: {word}"])(test)

    return decorate


def test_every_example_has_a_test_that_runs_it() -> None:
    run = sorted(test.example.code for test in globals().values() if hasattr(test, "example"))
    assert run == sorted(block for page in PAGES for block in code_blocks(page, "python"))


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_python(page: str) -> None:
    """Those too that are not run for want of a GPU."""
    for block in code_blocks(page, "python"):
        compile(block, page, "exec")


@runs("README.md", "# was: from transformers")
def test_the_change_of_the_import(example: Example) -> None:
    found = example.run()
    assert found["BitImageProcessor"] is bitfast.BitImageProcessor


@runs("README.md", "cat.jpg")
def test_the_example_of_the_readme(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example.run({"google/bit-50": MODEL_PATH, "cat.jpg": PHOTOGRAPH})
    assert capsys.readouterr().out.strip() in [str(digit) for digit in range(10)]


@runs("docs/accelerate.md", "bitfast.accelerate")
def test_accelerating(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    model = dpt_hybrid()
    text = repr(model)
    example.run(bitfast=bitfast, model=model)
    assert "modules are bitfast's now" in capsys.readouterr().out
    assert repr(model) == text


@runs("docs/accelerate.md", "from bitfast.transformers")
def test_the_classes_of_transformers(example: Example) -> None:
    found = example.run()
    assert issubclass(found["BitForImageClassification"], transformers.PreTrainedModel)


@runs("docs/accelerate.md", "pipeline")
def test_a_pipeline(example: Example) -> None:
    files = {"google/bit-50": MODEL_PATH}
    found = example.run(files, bitfast=bitfast, transformers=transformers)
    assert type(found["classify"].model) is bitfast.transformers.BitForImageClassification
    assert found["classify"](str(PHOTOGRAPH))


@runs("docs/accelerate.md", ".npz")
def test_foreign_checkpoints(example: Example, tmp_path: Path) -> None:
    model = timm_model()
    files = {
        "timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k": save_folder(tmp_path / "timm", model),
        "BiT-M-R50x3.npz": save_npz(tmp_path / "google.npz", google_arrays(model)),
    }
    example.run(files, BitForImageClassification=bitfast.BitForImageClassification)


@runs("docs/serving.md", "dtype=torch.bfloat16")
def test_mixed_precision(example: Example) -> None:
    files, images = {"google/bit-50": MODEL_PATH}, torch.randn(2, 3, 64, 64)
    found = example.run(files, bitfast=bitfast, torch=torch, images=images)
    assert found["logits"].dtype == torch.bfloat16


@runs("docs/serving.md", "use_backend")
def test_demanding_a_backend(example: Example) -> None:
    model = our_model("BitModel").eval()
    example.run(bitfast=bitfast, model=model, images=torch.randn(1, 3, 64, 64))


@needs_cuda
@runs("docs/serving.md", "bitfast.capture")
def test_capturing_cuda_graphs(example: Example) -> None:
    example.run({"google/bit-50": MODEL_PATH}, bitfast=bitfast, torch=torch)


@needs_cuda
@runs("docs/serving.md", 'device="cuda").pixel_values')
def test_processing_images_on_a_gpu(example: Example) -> None:
    from PIL import Image

    photographs = [Image.open(PHOTOGRAPH)]
    files = {"google/bit-50": MODEL_PATH}
    found = example.run(files, bitfast=bitfast, photographs=photographs)
    assert found["pixel_values"].is_cuda


@needs_cuda
@runs("docs/training.md", "torch.cuda.graph")
def test_capturing_a_training_step(example: Example) -> None:
    model = our_model("BitForImageClassification", num_labels=1000).cuda().train()
    batches = [(torch.randn(128, 3, 224, 224), torch.randint(1000, (128,)))]
    found = example.run(torch=torch, model=model, batches=batches)
    assert torch.isfinite(found["loss"])


@runs("docs/training.md", "lr=0.003")
def test_a_training_step(example: Example) -> None:
    model = our_model("BitForImageClassification")
    before = model.classifier[1].weight.clone()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    example.run(torch=torch, model=model, images=images, labels=labels)
    assert not torch.equal(model.classifier[1].weight, before)


def test_the_first_example_of_transformers_documentation() -> None:
    from bitfast import BitConfig, BitModel

    # Initializing a BiT bit-50 style configuration, then a model (with random weights) from it.
    configuration = BitConfig()
    with torch.device("meta"):
        model = BitModel(configuration)
    configuration = model.config
    assert configuration.depths == [3, 4, 6, 3]
    assert model.num_parameters() == 23_500_352


def test_the_last_example_of_transformers_documentation() -> None:
    from PIL import Image
    from transformers import BitForImageClassification as Theirs
    from transformers import BitImageProcessor as TheirProcessor

    from bitfast import BitForImageClassification, BitImageProcessor

    image = Image.open(PHOTOGRAPH)
    labels = []
    for processor_class, model_class in (
        (BitImageProcessor, BitForImageClassification),
        (TheirProcessor, Theirs),
    ):
        image_processor = processor_class.from_pretrained(MODEL_PATH)
        model = model_class.from_pretrained(MODEL_PATH)
        inputs = image_processor(image, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        labels.append(model.config.id2label[logits.argmax(-1).item()])
    assert labels[0] == labels[1]


@runs("docs/embeddings.md", "nearest")
def test_nearest_neighbors(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_by_class(digits()[:500], Path("digits"))
    assert main(["embed", "digits/", "--output", "digits.npy"]) == 0
    found = example.run()
    shown = re.findall(r"^(\d\.\d+) (\S+)$", text_of(example.page), flags=re.MULTILINE)
    assert [found["names"][index] for index in found["nearest"]] == [name for _, name in shown]
    similarity = found["similarity"][found["nearest"]].tolist()
    assert similarity == pytest.approx([float(number) for number, _ in shown], abs=1e-3)


@runs("docs/export.md", "exportable")
def test_exporting(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = our_model("BitForImageClassification", depths=[1], hidden_sizes=[16]).eval()
    images = torch.randn(2, 3, 64, 50)
    example.run(bitfast=bitfast, torch=torch, model=model, images=images)
    with torch.no_grad():
        expected = model(images).logits
        (packaged,) = torch._inductor.aoti_load_package("bit.pt2")(images)
    session = onnxruntime.InferenceSession("bit.onnx", providers=["CPUExecutionProvider"])
    (converted,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for actual in (packaged, torch.from_numpy(converted)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alias", ["parameter.data", "parameter.detach().numpy()"])
def test_ways_to_write_that_torch_does_not_count(alias: str) -> None:
    """The documentation names them, and what to do after them."""
    section = r"^## Standardized weights are kept$.*?(?=^## )"
    (text,) = re.findall(section, text_of("docs/behaviour.md"), re.M | re.S)
    assert f"`{alias}`" in text
    assert "`model.eval()`" in text
    model = our_model("BitModel").eval()
    images = torch.randn(1, 3, 64, 64)
    parameter = model.embedder.convolution.weight
    with torch.no_grad():
        before = model(images).last_hidden_state
        version = parameter._version
        eval(alias)[...] *= -1
        assert parameter._version == version
        after = model.eval()(images).last_hidden_state
        assert not torch.equal(before, after)
        parameter.copy_(parameter.clone())  # which torch counts
        assert torch.equal(model(images).last_hidden_state, after)


# ---- commands -----------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The shell commands that a page shows, in words."""
    lines = "".join(code_blocks(page, "console")).splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "bitfast":
            assert callable(build_parser().parse_args(arguments).run)
        elif program == "make":
            assert arguments[0] in targets


@runs("docs/server.md", "bitfast.serving.app")
def test_the_application_of_a_server(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    applications = []
    monkeypatch.setattr(serve, "run", applications.append)
    example.run({"google/bit-50": MODEL_PATH})
    assert [type(application) for application in applications] == [serve.Application]


# ---- links --------------------------------------------------------------------------------------


def without_code_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def links(page: str) -> list[tuple[Path, str]]:
    """The files that a page links to, and the anchors in them, which may be empty."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            found.append(((ROOT / page).parent / path if path else ROOT / page, anchor))
    return [(path.resolve(), anchor) for path, anchor in found]


def anchors(page: str) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code_blocks(page), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", WITH_LINKS)
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in links(page):
        assert path.exists(), path
        if anchor:
            assert anchor in anchors(str(path.relative_to(ROOT.resolve()))), (path, anchor)


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set(), [(ROOT / "README.md").resolve()]
    while ahead:
        page = ahead.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            ahead += [path for path, _ in links(str(page.relative_to(ROOT.resolve())))]
    assert {(ROOT / page).resolve() for page in WITH_LINKS} <= reached


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= MOST_LINES_OF_README
