"""Parts of the GPU report about whole models: inference and training, beside the peers that are installed.

How a contestant is checked and timed is in ``bench.gpu_model_runs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .gpu_model_runs import (
    THEIRS,
    Checks,
    FixedBatch,
    Graphed,
    Setting,
    logits_of,
    our_model,
    placed,
    race,
    their_model,
)
from .gpu_timing import Session, last_lines, run_parts
from .torchvision_import import import_torchvision


def settings_of(session: Session) -> list[Setting]:
    """Return the settings, the most telling first."""
    if session.is_smoke:
        return [
            Setting("tiny", 2, "inference", "float32"),
            Setting("tiny", 2, "training", "autocast"),
        ]
    r50 = "R50x1"
    return [
        Setting(r50, 128, "inference", "bfloat16"),
        Setting(r50, 1, "inference", "bfloat16"),
        Setting(r50, 8, "inference", "bfloat16"),
        Setting(r50, 128, "training", "autocast"),
        Setting(r50, 128, "training", "bfloat16"),
        Setting("R101x3", 16, "inference", "bfloat16"),
        Setting(r50, 128, "inference", "float16"),
        Setting(r50, 1, "inference", "float16"),
        Setting("R101x3", 16, "training", "autocast"),
        Setting(r50, 8, "inference", "float16"),
        Setting("R101x3", 16, "inference", "float16"),
        Setting("R101x3", 16, "training", "bfloat16"),
    ]


def is_installed(session: Session, package: str) -> bool:
    """Say whether a peer is installed; if not, a row says so."""
    import_torchvision()  # the others import it where they find it
    try:
        __import__(package)
    except ImportError as error:
        session.add("peers", package, "not installed", note=last_lines(error, 1))
        return False
    return True


def models_eager(session: Session) -> None:
    """Compare bitfast as it is, and in a CUDA graph, with transformers as it is."""
    checks = Checks(session)
    has_transformers = is_installed(session, "transformers")
    for setting in settings_of(session):

        def run(contestant: str, make: Any, setting: Setting = setting, **options: Any) -> None:
            session.attempt(
                setting.case,
                contestant,
                lambda: race(
                    session,
                    checks,
                    setting,
                    contestant,
                    lambda: placed(session, make, setting),
                    **options,
                ),
            )

        if has_transformers:
            run(THEIRS, their_model)
            if setting.mode == "inference":
                run(
                    f"{THEIRS}, channels_last",
                    their_model,
                    wrap=lambda model: model.to(memory_format=torch.channels_last),
                    layout=torch.channels_last,
                )
        run("bitfast eager", our_model)
        if setting.mode == "training":
            continue
        if session.device == "cuda":
            run(
                "bitfast, CUDA graph",
                our_model,
                wrap=lambda model: FixedBatch(Graphed(model), model),
            )
        else:
            session.add(setting.case, "bitfast, CUDA graph", "skipped", note="needs a GPU")


def compiled_settings(session: Session) -> list[Setting]:
    """Return what is compiled: each takes about a minute."""
    if session.is_smoke:
        return settings_of(session)[:1]
    return [
        Setting("R50x1", 128, "inference", "bfloat16"),
        Setting("R50x1", 1, "inference", "bfloat16"),
        Setting("R50x1", 128, "training", "autocast"),
    ]


def race_compiled(
    session: Session,
    checks: Checks,
    setting: Setting,
    contestant: str,
    make: Callable[[str], nn.Module],
    **options: Any,
) -> None:
    """Race a compiled model."""
    session.attempt(
        setting.case,
        contestant,
        lambda: race(
            session,
            checks,
            setting,
            contestant,
            lambda: placed(session, make, setting),
            lambda model: FixedBatch(logits_of(session.compile(model, **options)), model),
        ),
    )


def models_compiled(session: Session) -> None:
    """Compare the compiled models, bitfast and transformers, in torch.compile's default mode."""
    checks = Checks(session)
    has_transformers = is_installed(session, "transformers")
    for setting in compiled_settings(session):
        race_compiled(session, checks, setting, "bitfast compiled", our_model, dynamic=False)
        if has_transformers:
            name = "transformers compiled (default mode)"
            race_compiled(session, checks, setting, name, their_model, dynamic=False)


def models_peers(session: Session) -> None:
    """Time what is not BiT's function but of its size: timm's BiT and torchvision's ResNet-50."""
    setting = compiled_settings(session)[0]

    def timm_model() -> nn.Module:
        import timm

        return timm.create_model("resnetv2_50x1_bit", pretrained=False)

    def torchvision_model() -> nn.Module:
        import torchvision

        return torchvision.models.resnet50(weights=None)

    for package, make in (("timm", timm_model), ("torchvision", torchvision_model)):
        if not is_installed(session, package):
            continue
        name = {"timm": "timm resnetv2_50x1_bit", "torchvision": "torchvision ResNet-50"}[package]

        def moved(make: Callable[[], nn.Module] = make) -> nn.Module:
            model = make().to(session.device, setting.dtype, memory_format=torch.channels_last)
            return model.eval()

        def run(name: str = name, moved: Callable[[], nn.Module] = moved) -> None:
            race(
                session,
                None,
                setting,
                f"{name}, compiled, channels_last",
                moved,
                lambda model: session.compile(model, dynamic=False),
                layout=torch.channels_last,
            )

        session.attempt(setting.case, name, run)


def models_autotuned(session: Session) -> None:
    """Compile transformers with all the autotuning there is; it may take longer than there is time."""
    if not is_installed(session, "transformers"):
        return
    checks = Checks(session)
    for setting in compiled_settings(session)[:2]:
        mode = "max-autotune" if setting.batch == 1 else "max-autotune-no-cudagraphs"
        name = f"transformers compiled ({mode})"
        race_compiled(session, checks, setting, name, their_model, mode=mode, dynamic=False)


PARTS = {
    "models_eager": models_eager,
    "models_compiled": models_compiled,
    "models_peers": models_peers,
    "models_autotuned": models_autotuned,
}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
