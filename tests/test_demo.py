"""The demo, with a small network: what it shows, and that it shows no speed without agreement."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bitfast import BitConfig, BitForImageClassification, cli, extras
from bitfast.commands import comparison, demo
from bitfast.digits import held_out_images
from bitfast.finetuning import demonstration

SMALL = BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def show_comparison() -> bool:
    return demo.show_comparison(SMALL, batch_size=2, image_size=48)


def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds of the two processes."""
    monkeypatch.setattr(comparison, "peak_memory", lambda *_: 2**30)


# ---- digits -------------------------------------------------------------------------------------


def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_digits()
    out = capsys.readouterr().out
    count = len(held_out_images())
    found = re.search(r"Right: (\d+) of (\d+) images, (\d+\.\d) %", out)
    assert found is not None
    assert int(found[2]) == count
    assert float(found[3]) == round(100 * int(found[1]) / count, 1)
    assert int(found[1]) >= 0.95 * count
    assert len(re.findall(r"says \d, +\d+\.\d\d %", out)) == 4
    assert len(re.findall(r"it is \d", out)) == 4
    assert out.count("█") > 4 * 8


def test_art() -> None:
    image = Image.new("L", (8, 8))
    image.putpixel((1, 0), 255)
    image.putpixel((0, 7), 128)
    lines = demo.art(image)
    assert len(lines) == 8
    assert {len(line) for line in lines} == {16}
    assert lines[0] == "  ██" + " " * 12
    assert lines[7] == "▒▒" + " " * 14


def test_art_of_another_size() -> None:
    assert demo.art(Image.new("RGB", (80, 40), "white")) == ["█" * 16] * 8


def test_art_on_a_terminal_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert demo.art(Image.new("L", (8, 8), 255)) == ["#" * 16] * 8


# ---- the comparison -----------------------------------------------------------------------------


def test_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_comparison()
    out = capsys.readouterr().out
    assert "agreed: the latter is at most 1e-05" in out
    head, times, memory = (
        next(line.split("  ") for line in out.splitlines() if text in line)
        for text in ("transformers / bitfast", "time of a batch", "peak memory")
    )
    assert [cell.strip() for cell in head if cell] == [
        "transformers",
        "bitfast",
        "transformers / bitfast",
    ]
    assert [bool(re.fullmatch(r"\d+ ms", cell.strip())) for cell in times if cell][1:3] == [
        True
    ] * 2
    numbers = [float(cell.split()[0]) for cell in memory[2:] if cell.strip()]
    assert numbers[0] > 100
    assert numbers[1] > 100
    assert numbers[2] == pytest.approx(numbers[0] / numbers[1], abs=0.02)
    assert "median of 9 runs" in out


def test_no_speed_without_agreement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = comparison.load

    def load_something_else(library: str, folder: Path) -> Any:
        model = load(library, folder)
        if library == "bitfast":
            with torch.no_grad():
                model.classifier[1].weight[0] *= 1.001
        return model

    monkeypatch.setattr(comparison, "load", load_something_else)
    monkeypatch.setattr(comparison, "time_in_turns", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(comparison, "peak_memory", lambda *_: pytest.fail("measured"))
    assert not show_comparison()
    out = capsys.readouterr().out
    assert "NOT agreed" in out
    assert " ms" not in out


@pytest.mark.parametrize(
    ("values", "good"),
    [
        ([3.0, 4.0], True),
        ([3.0, 4.00001], True),
        ([3.0, 4.0001], False),
        ([3.0, float("nan")], False),
        ([3.0, float("inf")], False),
    ],
)
def test_agreement(values: list[float], good: bool) -> None:
    agreement = comparison.compare(torch.tensor([3.0, 4.0]), torch.tensor(values))
    assert agreement.good is good
    if good:
        expected = abs(torch.tensor(values).double()[1].item() - 4.0)
        assert agreement.largest == pytest.approx(expected)
        assert agreement.relative == pytest.approx(expected / 5.0)


def test_without_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = demo.package_version
    monkeypatch.setattr(
        demo, "package_version", lambda name: None if name == "transformers" else version(name)
    )
    without_memory(monkeypatch)
    assert show_comparison()
    out = capsys.readouterr().out
    assert "transformers is not installed: bitfast runs alone, compared with nothing." in out
    assert "agreed" not in out
    assert "transformers /" not in out
    assert re.search(r"peak memory +1024 MiB\n", out)


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    images, kind = demo.example_images(3)
    assert kind == "random images"
    assert len(images) == 3
    again, _ = demo.example_images(3)
    assert images[2].tobytes() == again[2].tobytes() != images[1].tobytes()


def test_photographs() -> None:
    images, kind = demo.example_images(10)
    assert kind == "photographs"
    assert len(images) == 10
    assert len({image.convert("RGB").tobytes() for image in images}) == len(demo.PHOTOGRAPHS)


def test_memory_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def fail_for_bitfast(command: list[str], **options: Any) -> Any:
        if "from bitfast import" in command[5]:
            command = [sys.executable, "-c", "import no_such_module"]
        else:
            command = [sys.executable, "-c", "print(2**20)"]
        return run(command, **options)

    monkeypatch.setattr(comparison.subprocess, "run", fail_for_bitfast)
    assert show_comparison()
    out = capsys.readouterr().out
    assert re.search(r"peak memory +1024 MiB +- +-\n", out)
    assert "Peak memory of bitfast was not measured: the process failed: ModuleNotFound" in out


def test_memory_is_the_other_process_own(tmp_path: Path) -> None:
    """A process inherits the peak of the one that starts it, which must not be shown."""
    BitForImageClassification(SMALL).save_pretrained(tmp_path)
    pixel_values = torch.rand(1, 3, 32, 32)
    before = comparison.peak_memory("bitfast", tmp_path, pixel_values)
    ballast = torch.ones(2**29, dtype=torch.uint8)
    after = comparison.peak_memory("bitfast", tmp_path, pixel_values)
    assert ballast[-1] == 1
    assert after < before + 2**27


def test_models_take_turns() -> None:
    order: list[str] = []

    class Recorder(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, pixel_values: torch.Tensor) -> Any:
            order.append(self.name)
            return type("Output", (), {"logits": pixel_values})

    models = {"a": Recorder("a"), "b": Recorder("b")}
    seconds = comparison.time_in_turns(models, torch.zeros(1), rounds=4, budget=60)
    assert "".join(order) == "ab" + "abbaabba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    seconds = comparison.time_in_turns(models, torch.zeros(1), rounds=99, budget=0)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


# ---- fine-tuning --------------------------------------------------------------------------------


def test_fine_tuning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "EPOCHS", 12)
    demonstration.show()
    out = capsys.readouterr().out
    found = re.search(r"(\d+\.\d) % of (\d+) digits from 5 to 9 right, from 5 images", out)
    assert found is not None, out
    assert float(found[1]) > 50  # by chance: 20
    assert 150 < int(found[2]) < len(held_out_images()) / 2
    assert out.count("\n") == 2


def test_fine_tuning_without_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "finetune", ("no_such_package",))
    demonstration.show()
    assert capsys.readouterr().out == (
        "\n3. Fine-tuning needs no_such_package, not installed here: pip install 'bitfast[finetune]'\n"
    )


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("agrees", [True, False])
def test_command(
    agrees: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "show_digits", lambda: demo.say("the digits"))
    monkeypatch.setattr(demo, "show_comparison", lambda: agrees)
    monkeypatch.setattr(demonstration, "show", lambda: demo.say("the transfer"))
    assert cli.main(["demo", "--threads", "1"]) == (0 if agrees else 1)
    assert torch.get_num_threads() == 1
    out = capsys.readouterr().out
    assert re.match(r"bitfast \S+, python \S+, torch \S+, transformers", out)
    assert "device cpu, 1 thread, float32\n" in out
    assert out.index("the digits") < out.index("the transfer")
