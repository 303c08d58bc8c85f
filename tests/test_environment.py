"""What ``bitfast env`` says, for people and for machines."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

import bitfast
from bitfast import cli
from bitfast.commands import environment


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line]
    found = {line[0]: line[1] for line in lines if len(line) == 2}
    assert found["bitfast"] == bitfast.__version__
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "triton", "numpy", "pillow", "safetensors", "cpu", "cuda"} <= set(found)
    for row in bitfast.backends.backend_table():
        mark = "*" if row.default else ""
        line = next(
            line
            for line in out.splitlines()
            if [row.op, row.device, row.backend + mark] == line.split()[:3]
        )
        state = "runs" if row.available else f"no: {row.reason}"
        assert line.endswith(f"  {state} ({row.on_demand})" if row.on_demand else f"  {state}")


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["bitfast"] == bitfast.__version__
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["cuda"]["devices"] or found["cuda"]["problem"]
    for half in ("cpu", "cuda"):
        assert found["extension"][half]["path"] or found["extension"][half]["problem"]
    assert len(found["backends"]) == len(bitfast.backends.backend_table())
    for row in found["backends"]:
        assert row["available"] or row["reason"]


def test_env_without_some_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert cli.main(["env"]) == 0
    assert re.search(r"no-such-package +not installed\n", capsys.readouterr().out)
    assert environment.describe()["versions"]["no-such-package"] is None


def test_env_says_what_the_cpu_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "why_not_packed", lambda dtype: f"{dtype} is too much")
    monkeypatch.setattr(
        environment, "why_no_norm_convolution", lambda dtype: f"{dtype} is too little"
    )
    monkeypatch.setattr(environment, "instruction_set", lambda: None)
    text = environment.as_text(environment.describe())
    assert re.search(r"C\+\+ kernels use +nothing: they were not built\n", text)
    assert re.search(r"packed convolutions, bfloat16 +no: torch.bfloat16 is too much\n", text)
    assert re.search(r"norm convolutions, float32 +no: torch.float32 is too little\n", text)


def test_env_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "A Fast One", 9, 0, 80 * 2**30

    monkeypatch.setattr(environment, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    text = environment.as_text(environment.describe())
    assert "A Fast One, capability 9.0, 80.0 GiB\n" in text


def test_env_with_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("No CUDA GPUs\nare available")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reason = environment.cuda_problem()
    assert reason == "No CUDA GPUs are available (CUDA_VISIBLE_DEVICES='')"


def test_env_checks_that_kernels_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = environment.describe()
    missing = environment.missing_kernels(found)
    assert cli.main(["env", "--check"]) == bool(missing)
    for row in found["backends"]:
        if (row["op"], row["device"]) == ("same_padding", "cpu"):
            is_plain = row["backend"] == "reference"
            row.update(
                default=is_plain, available=is_plain, reason="" if is_plain else "it was not built"
            )
    monkeypatch.setattr(environment, "describe", lambda: found)
    capsys.readouterr()
    assert cli.main(["env", "--check"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert set(said) - set(missing) == {
        "same_padding on cpu: the native kernel does not run: it was not built"
    }
