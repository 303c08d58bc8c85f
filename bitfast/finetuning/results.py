"""What a finished run leaves in its folder: all of it, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfast.checkpoints.files import CONFIG_NAME, replace_files, text_writer
from bitfast.checkpoints.weights import weight_writers
from bitfast.finetuning.card import CARD_NAME, Facts, model_card
from bitfast.finetuning.charts import confusion, curves, png_writer
from bitfast.finetuning.checkpoint import CHECKPOINT_NAME
from bitfast.finetuning.evaluation import Evaluation
from bitfast.finetuning.folder import (
    CONFUSION,
    CURVES,
    PROCESSOR_NAME,
    RECORD_NAME,
    REPORT_CSV,
    REPORT_JSON,
)
from bitfast.finetuning.metrics import METRICS_NAME, read_rows
from bitfast.finetuning.report import as_csv, as_json, report_classes


def write_results(
    folder: Path,
    model: Any,
    processor: Any,
    evaluation: Evaluation,
    facts: Facts,
    settings: dict[str, Any],
) -> None:
    """Write model, processor, reports, charts and card; the checkpoint goes once they are there.

    Args:
        folder: Holds ``metrics.jsonl``.
        model: Trained.
        processor: Of its images.
        evaluation: Of the trained model.
        facts: For the card.
        settings: What the run did, by which the same command knows that it is finished.

    Raises:
        OSError: a file cannot be written; the folder is as it was.
    """
    reports = report_classes(evaluation, facts.classes)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    record = {"settings": settings, "command": facts.command, "versions": dict(facts.versions)}
    writers = {
        **weight_writers(model.state_dict()),
        CONFIG_NAME: _text(model.config.to_json_string()),
        PROCESSOR_NAME: _text(processor.to_json_string()),
        CARD_NAME: _text(model_card(facts, evaluation)),
        REPORT_JSON: _text(json.dumps(as_json(evaluation, reports), indent=2) + "\n"),
        REPORT_CSV: _text(as_csv(reports)),
        CURVES: png_writer(curves(read_rows(folder / METRICS_NAME))),
    }
    if len(evaluation.labels):
        writers[CONFUSION] = png_writer(confusion(evaluation, facts.classes))
    # The last: once it is there a run is finished, and what is missing then would never be written.
    writers[RECORD_NAME] = _text(json.dumps(record, indent=2) + "\n")
    replace_files(folder, writers, stale=[CHECKPOINT_NAME])


def _text(text: str) -> Callable[[Path], None]:
    """Return a writer of text, in which parts of paths that are not Unicode are spelled out."""
    return text_writer(text.encode(errors="backslashreplace").decode())
