"""Training, saving, resuming, evaluating and serving with transformers' own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import bitfast
import bitfast.transformers as classes
from tests.model_pairs import assert_close, move_weights
from tests.tiny_models import TINY, assert_same_weights, file_names

NAME = "BitForImageClassification"
KINDS = ["bitfast.transformers", "accelerated"]


class Photographs(Dataset):
    """Images and labels, with a column that the model does not take."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.rand(3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": index % 3, "file": f"{index}.jpg"}


def model(kind: str) -> Any:
    torch.manual_seed(5)
    made = transformers.BitForImageClassification(transformers.BitConfig(**TINY))
    move_weights(made)
    if kind == "transformers":
        return made
    if kind == "accelerated":
        bitfast.accelerate(made)
        return made
    ours = classes.BitForImageClassification(transformers.BitConfig(**TINY))
    ours.load_state_dict(made.state_dict())
    return ours


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options},
    )
    return Trainer(
        model=model, args=arguments, train_dataset=Photographs(), eval_dataset=Photographs(),
        compute_metrics=accuracy,
    )  # fmt: skip


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_reload_resume_evaluate(kind, tmp_path):
    expected = trainer(model("transformers"), tmp_path / "theirs")
    expected.train()
    whole = trainer(model(kind), tmp_path / "whole")
    whole.train()
    assert_close(losses(whole), losses(expected), 1e-2)  # rounding, six steps long
    metrics = whole.evaluate()
    assert metrics["eval_accuracy"] == expected.evaluate()["eval_accuracy"]
    last = tmp_path / "whole" / "checkpoint-6"
    assert {"config.json", "model.safetensors"} <= file_names(last)

    for source in (classes, transformers, bitfast):
        assert_same_weights(getattr(source, NAME).from_pretrained(last), whole.model)
    reloaded = trainer(classes.BitForImageClassification.from_pretrained(last), tmp_path / "eval")
    assert reloaded.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)

    resumed = trainer(model(kind), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(resumed)) == 6
    for name, tensor in whole.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name], tensor, 1e-4, name)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trainer(model("bitfast.transformers"), tmp_path, save_strategy="no")
    plain.train()
    for number, options in enumerate(
        ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}})
    ):
        ours = trainer(
            model("bitfast.transformers"), tmp_path / str(number), save_strategy="no",
            gradient_checkpointing=True, **options,
        )  # fmt: skip
        assert all(stage.gradient_checkpointing is False for stage in ours.model._stages())
        ours.train()
        assert ours.model.is_gradient_checkpointing
        assert ours.model._stages()[0].checkpoint_options["use_reentrant"] is bool(options)
        assert_close(losses(ours), losses(plain), 1e-3)


def test_offloading_what_is_recomputed_is_refused():
    ours = model("bitfast.transformers")
    with pytest.raises(ValueError, match="offloaded"):
        ours._set_gradient_checkpointing(True, lambda *_: None)
    assert not ours.is_gradient_checkpointing


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_and_reloaded(kind, tmp_path):
    config = peft.LoraConfig(target_modules=["conv1", "conv2"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model(kind), config)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    ours = trainer(adapted, tmp_path, save_strategy="no", label_names=["labels"])
    ours.train()
    changed = [n for n, t in adapted.state_dict().items() if not torch.equal(t, before[n])]
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    ours.save_model(str(tmp_path / "adapter"))
    reloaded = peft.PeftModel.from_pretrained(model(kind), str(tmp_path / "adapter"))
    with torch.no_grad():
        pixels = torch.rand(2, 3, 32, 32)
        expected = adapted.eval()(pixels).logits
        assert_close(reloaded(pixels).logits, expected, 1e-5)


# ---- pipelines ------------------------------------------------------------------------------------


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (61, 50, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model("transformers").save_pretrained(tmp_path)
    classes.BitImageProcessor(size=40, crop_size=32).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_on_registered_classes(task, folder, photograph):
    expected = transformers.pipeline(task, model=str(folder))(photograph)
    with bitfast.register_with_transformers():
        pipeline = transformers.pipeline(task, model=str(folder))
        assert type(pipeline.model).__module__ == "bitfast.transformers"
        assert type(pipeline.image_processor).__module__ == "bitfast.transformers"
        actual = pipeline(photograph)
    assert_close(
        numbers(actual), numbers(expected), 1e-2
    )  # of fast processors; slow ones are exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_on_models(task, kind, photograph):
    processor = classes.BitImageProcessor(size=40, crop_size=32)
    expected, actual = (
        transformers.pipeline(
            task, model=made if "class" in task else made.bit, image_processor=processor
        )
        for made in (model("transformers").eval(), model(kind).eval())
    )
    assert_close(numbers(actual(photograph)), numbers(expected(photograph)), 1e-5)
    batch = actual([photograph, photograph], batch_size=2)
    assert_close(numbers(batch[1]), numbers(expected(photograph)), 1e-5)


def numbers(result: Any) -> torch.Tensor:
    """What a pipeline has computed: scores by label, or features."""
    if isinstance(result[0], dict):
        return torch.tensor([item["score"] for item in sorted(result, key=lambda i: i["label"])])
    return torch.tensor(result)
