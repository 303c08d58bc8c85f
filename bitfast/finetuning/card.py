"""The model card of a fine-tuned network: what it learned from, how, and how accurate it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfast.finetuning.evaluation import Evaluation
from bitfast.finetuning.recipe import Choice

CARD_NAME = "README.md"
MOST_CLASSES = 30
"""Classes up to which each is named."""

TEMPLATE = """\
---
{metadata}
---

# {name}

A Big Transfer (BiT) network that tells {classes} classes of images apart: {names}.
It is `{base}`, fine-tuned with `bitfast finetune`. It loads in bitfast and in transformers 4.56:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({name!r})
model = AutoModelForImageClassification.from_pretrained({name!r})
```

## Accuracy

{accuracy}

## Data

{data}

## Training

By the rule of the paper (BiT-HyperRule, [arXiv 1912.11370](https://arxiv.org/abs/1912.11370), section 3.3),
which chooses from the data, or as given:

| | | why |
|---|---|---|
{choices}

- Seed: {seed}.
- Command: `{command}`
- Versions: {versions}.

## Limits

It names one of its classes for any image whatsoever, and its probabilities are not calibrated.
"""


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        name: Of the model: its folder's name.
        base: The checkpoint that was fine-tuned: a name on the Hub, or a folder.
        classes: Names.
        data: Where the images come from.
        training: How many images the network learned from.
        left_out: Images that could not be used.
        choices: Of the recipe and the machine, with reasons.
        seed: Of the run.
        command: That made the model.
        versions: Of the packages.
    """

    name: str
    base: str
    classes: Sequence[str]
    data: str
    training: int
    left_out: int
    choices: Sequence[Choice]
    seed: int
    command: str
    versions: Mapping[str, str | None]


def model_card(facts: Facts, evaluation: Evaluation) -> str:
    """Return the text of a model card, with the metadata that the Hugging Face Hub reads."""
    names = ", ".join(facts.classes[:MOST_CLASSES])
    if len(facts.classes) > MOST_CLASSES:
        names += f", and {len(facts.classes) - MOST_CLASSES} more (`config.json` has all)"
    return TEMPLATE.format(
        metadata=_metadata(facts, evaluation),
        name=facts.name,
        base=facts.base,
        classes=len(facts.classes),
        names=names,
        accuracy=_accuracy(evaluation),
        data=_data(facts, evaluation),
        choices="\n".join(
            f"| {_cell(choice.name)} | {_cell(choice.value)} | {_cell(choice.reason)} |"
            for choice in facts.choices
        ),
        seed=facts.seed,
        command=facts.command,
        versions=", ".join(
            f"{name} {version}" for name, version in facts.versions.items() if version
        ),
    )


def _metadata(facts: Facts, evaluation: Evaluation) -> str:
    # Imported here: it costs a third of a second, and only this needs it.
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if len(evaluation.labels):
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="image-folder",
                dataset_name=f"{Path(facts.data).name}, validation images",
                metric_type="accuracy",
                metric_value=round(evaluation.measurement.accuracy, 4),
            )
        ]
    is_local = Path(facts.base).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["bit", "image-classification", "bitfast"],
        metrics=["accuracy"],
        base_model=None if is_local else facts.base,
        model_name=facts.name if results else None,
        eval_results=results,
    ).to_yaml()


def _accuracy(evaluation: Evaluation) -> str:
    if not len(evaluation.labels):
        return "Not measured: there were no validation images."
    measured = evaluation.measurement
    low, high = measured.confidence_interval()
    return (
        f"**{measured.accuracy:.2%}** on the validation images: {measured.correct} correct out of "
        f"{measured.total}\n(95% confidence interval {low:.2%} to {high:.2%}, Wilson's score interval). "
        "`report.csv` has each class."
    )


def _data(facts: Facts, evaluation: Evaluation) -> str:
    lines = [
        f"- Images: `{facts.data}`",
        f"- Training images: {facts.training:,}. Validation images: {len(evaluation.labels):,}, from which "
        "nothing was learned and by which nothing was chosen.",
    ]
    if facts.left_out:
        lines.append(f"- Left out, because they could not be used: {facts.left_out:,} images.")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
