"""What ``bitfast finetune`` says of arguments that are wrong, or of data that are of no use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitfast import cli, extras
from bitfast.finetuning.arguments import options_from
from tests.finetuning.runs import ROOT, names_in, run, write_images


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
        (["--steps", "many"], "--steps: must be an integer of at least 1, got 'many'"),
        (["--learning-rate", "0"], "--learning-rate: must be a number above 0, got '0'"),
        (["--learning-rate", "inf"], "--learning-rate: must be a number above 0, got 'inf'"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number above 0, got 'nan'"),
        (["--valid-fraction", "1"], "must be a number of at least 0 and at most 0.9, got '1'"),
        (["--seed", "-1"], "--seed: must be an integer of at least 0"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--warmup", "-1"], "--warmup: must be an integer of at least 0, got '-1'"),
        (["--mixup", "x"], "--mixup: must be a number of at least 0, got 'x'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(given: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["finetune", "data", "--output", "run", *given])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: bitfast finetune [-h]")
    assert said in err


def test_what_is_required(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune"])
    assert "the following arguments are required: DATA, --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--crop", 19], "crop must be at most resize, 18, from which it is cut, got 19"),
        (
            ["--mixup", 0.1, "--micro-batch", 3],
            "--micro-batch: must be even where images are mixed",
        ),
        (["--device", "abacus"], "--device: the device 'abacus' cannot be used"),
        (["--device", "cuda:99"], "--device: the device 'cuda:99' cannot be used"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(options, said, images, base, tmp_path, capsys) -> None:
    assert run(images, tmp_path / "run", base, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("bitfast: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "run").exists()


def test_a_result_among_what_it_is_made_of(images, base, tmp_path, capsys) -> None:
    for data, more in ((images, ()), (tmp_path / "x", ("--valid", images))):
        assert run(data, images / "run", base, *more) == 2
        said = f"argument --output: must not be in the folder of images '{images}'"
        assert said in capsys.readouterr().err
    assert not (images / "run").exists()
    before = names_in(base)
    for model in (base, base / "model.safetensors"):
        assert run(images, base, model, "--overwrite") == 2
        assert f"must not be the folder of the model '{model}'" in capsys.readouterr().err
    assert names_in(base) == before


def test_models_and_data_of_no_use(images, base, tmp_path, capsys) -> None:
    assert run(images, tmp_path / "run", tmp_path / "nowhere") == 2
    assert f"argument --model: '{tmp_path / 'nowhere'}' cannot be loaded" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "run", base) == 2
    assert "nowhere" in capsys.readouterr().err
    alone = write_images(tmp_path / "alone", per_class=2)
    for name in ("blue", "green"):
        for path in (alone / name).iterdir():
            path.unlink()
        (alone / name).rmdir()
    assert run(alone, tmp_path / "run", base) == 2
    assert "at least two classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_extra(images, base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "finetune", ("matplotlib", "no_such_package"))
    assert run(images, tmp_path / "run", base) == 2
    assert "pip install 'bitfast[finetune]'" in capsys.readouterr().err


def test_images_that_are_left_out_are_told(base, tmp_path, capsys) -> None:
    """Broken headers are found before the run, broken pixels in it; both are counted, neither ends it."""
    images = write_images(tmp_path / "colors")
    (images / "red" / "0.png").write_text("not an image")
    broken = images / "red" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    assert run(images, tmp_path / "run", base, "--valid-fraction", 0) == 0
    out, err = capsys.readouterr()
    assert "23 training images" in out
    assert "1 left out" in out
    assert "red/0.png: not an image that Pillow can read" in err
    assert "red/1.png" in err
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Left out, because they could not be used: 2 images" in card


def test_overrides_reach_the_recipe() -> None:
    given = (
        "finetune data --output run --decays 3 5 --no-flip --warmup 2 --mixup 0.2 --momentum 0.5"
    )
    options: Any = options_from(cli.build_parser().parse_args(given.split()))
    chosen = {name: value for name, value in options.overrides.items() if value is not None}
    assert chosen == {
        "decay_steps": (3, 5), "flip": False, "warmup_steps": 2, "mixup_alpha": 0.2, "momentum": 0.5,
    }  # fmt: skip
    assert options.data == Path("data")
    assert options.workers is None


def test_help_loads_nothing_of_the_command() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None\n"
        "from bitfast.cli import build_parser\nbuild_parser().format_help()\n"
        "assert 'bitfast.finetuning.command' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
