"""``bitfast finetune``, from its options to the files of its result."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from bitfast.commands.classify import Classifier
from bitfast.commands.environment import versions
from bitfast.configuration import BitConfig
from bitfast.finetuning.batches import EvaluationBatches, TrainingBatches
from bitfast.finetuning.card import Facts
from bitfast.finetuning.checkpoint import load_checkpoint
from bitfast.finetuning.dataset import VALID_FRACTION, Splits, open_splits
from bitfast.finetuning.errors import FinetuningError, UsageError
from bitfast.finetuning.evaluation import Evaluation
from bitfast.finetuning.folder import FinishedRunError, make_folder, open_folder
from bitfast.finetuning.hardware import choose_dtype, choose_micro_batch, choose_workers
from bitfast.finetuning.interruption import Interruption
from bitfast.finetuning.metrics import METRICS_NAME, MetricsLog
from bitfast.finetuning.processes import Processes, joined, losing_peers
from bitfast.finetuning.progress import Display, problem_lines, scanning
from bitfast.finetuning.recipe import Choice, Recipe, choose_recipe
from bitfast.finetuning.results import write_results
from bitfast.finetuning.training import Run, Schedule, Trainer
from bitfast.images.files import one_line, printable
from bitfast.modeling import BitForImageClassification

EVALUATIONS = 10
"""In a run, unless told otherwise."""
FINISHED = -1


@dataclass(frozen=True)
class Options:
    """What ``bitfast finetune`` is asked to do; its help describes each.

    Attributes:
        overrides: Values of fields of the recipe, instead of those that it would choose.
        command: As it was typed, for the model card.
    """

    data: Path
    output: Path
    model: str = "google/bit-50"
    valid: Path | None = None
    valid_fraction: float = VALID_FRACTION
    per_class: int | None = None
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    workers: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    overwrite: bool = False
    command: str = "bitfast finetune"


@dataclass(frozen=True)
class Plan:
    """What a run does, all of it decided."""

    splits: Splits
    recipe: Recipe
    choices: list[Choice]
    model: BitForImageClassification
    processor: Any
    dtype: torch.dtype
    micro_batch: int
    settings: dict[str, Any]


def finetune(options: Options) -> Evaluation | None:
    """Fine-tune a model, print what is chosen and found, and write the result.

    Returns:
        The last evaluation; None in all but the first process, and where an earlier run has done it all.

    Raises:
        FinetuningError: it cannot begin, cannot go on, or was interrupted.
        OSError: a file cannot be written.
    """
    with joined(options.device) as processes:
        try:
            return _finetune(options, processes)
        except FinetuningError as error:
            # Without the frames that it came through: they hold what must go before the processes part.
            problem = error.with_traceback(None)
            problem.__cause__ = problem.__context__ = None
    raise problem


def _finetune(options: Options, processes: Processes) -> Evaluation | None:
    say = functools.partial(print, flush=True) if processes.is_first else _say_nothing
    plan = processes.together(lambda: make_plan(options, processes))
    _show(plan, processes, say)
    with contextlib.ExitStack() as stack:
        start, log = processes.together(lambda: _open(options, plan, processes, stack))
        start = int(processes.sum(torch.tensor([start])).item())
        if start == FINISHED:
            say(f"{options.output} holds the result of this run already: nothing to do")
            return None
        if start:
            say(f"\nGoing on after step {start} of {plan.recipe.steps}")
        evaluation, undecoded = _train(options, plan, processes, start, log, stack)
    if not processes.is_first:
        return None
    facts = _facts(options, plan, undecoded)
    write_results(options.output, plan.model, plan.processor, evaluation, facts, plan.settings)
    if len(evaluation.labels):
        say(f"\nValidation accuracy {evaluation.measurement}")
    say(f"Wrote {options.output}")
    return evaluation


# ---- deciding -----------------------------------------------------------------------------------


def make_plan(options: Options, processes: Processes) -> Plan:
    """Look at the data and the checkpoint, and decide everything.

    Raises:
        UsageError: they cannot be used, or an option does not fit them.
    """
    _check_places(options)
    try:
        with scanning(processes.is_first) as progress:
            splits = open_splits(
                options.data,
                valid=options.valid,
                valid_fraction=options.valid_fraction,
                per_class=options.per_class,
                seed=options.seed,
                progress=progress,
            )
        recipe, choices = choose_recipe(
            len(splits.training), splits.training.sizes, options.overrides
        )
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    try:
        base = Classifier.load(options.model, torch.device("cpu"), "float32")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"argument --model: {options.model!r} cannot be loaded: {one_line(error)}"
        ) from error
    model = with_new_head(base.model, splits.classes)
    dtype, dtype_choice = choose_dtype(processes.device, options.dtype)
    micro_batch, micro_choice = _micro_batch(options, model, recipe, dtype, processes)
    return Plan(
        splits=splits,
        recipe=recipe,
        choices=[*choices, dtype_choice, micro_choice],
        model=model,
        processor=recipe.processor(base.processor),
        dtype=dtype,
        micro_batch=micro_batch,
        settings=_settings(options, splits, recipe, model, dtype),
    )


def _check_places(options: Options) -> None:
    """Keep the result apart from what it is made of, of which it would become, or remove, a part.

    Raises:
        UsageError: it would lie among the images, or in the place of the model.
    """
    output = options.output.resolve()
    for data in (options.data, options.valid):
        if data is not None and data.is_dir() and output.is_relative_to(data.resolve()):
            raise UsageError(
                f"argument --output: must not be in the folder of images {str(data)!r}, "
                f"got {str(options.output)!r}"
            )
    if Path(options.model).resolve().is_relative_to(output):
        raise UsageError(
            f"argument --output: must not be the folder of the model {options.model!r}"
        )


def with_new_head(
    base: BitForImageClassification, classes: Sequence[str]
) -> BitForImageClassification:
    """Return the network of a model under a new head for other classes, which starts at zero.

    Without stochastic depth, which the recipe does not have, and which would depend on more than the seed.
    """
    config = BitConfig.from_dict(base.config.to_dict())
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    config.drop_path_rate = 0.0
    model = BitForImageClassification(config)
    model.bit.load_state_dict(base.bit.state_dict())
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    return model.train()


def _micro_batch(
    options: Options,
    model: BitForImageClassification,
    recipe: Recipe,
    dtype: torch.dtype,
    processes: Processes,
) -> tuple[int, Choice]:
    if recipe.mixup_alpha and (options.micro_batch or 2) % 2:
        raise UsageError(
            "argument --micro-batch: must be even where images are mixed in pairs, "
            f"got {options.micro_batch}"
        )
    try:
        return choose_micro_batch(
            model, recipe.batch_size, recipe.crop, dtype, processes, options.micro_batch
        )
    except ValueError as error:  # of the network
        raise UsageError(f"argument --crop: {one_line(error)}") from error


def _settings(
    options: Options,
    splits: Splits,
    recipe: Recipe,
    model: BitForImageClassification,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return all that the result depends on, beyond rounding; equal settings, equal runs."""
    chosen = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(recipe).items()}
    return {
        "base weights": weights_digest(model.bit),
        "training images": splits.training.fingerprint(),
        "validation images": splits.validation.fingerprint(),
        "classes": list(splits.classes),
        "seed": options.seed,
        "dtype": str(dtype).removeprefix("torch."),
        **chosen,
    }


def weights_digest(model: nn.Module) -> str:
    """Return a hash of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _show(plan: Plan, processes: Processes, say: Callable[..., None]) -> None:
    splits = plan.splits
    if processes.is_first:
        for line in problem_lines(splits.problems):
            print(line, file=sys.stderr, flush=True)
    say(
        f"{len(splits.training):,} training images and {len(splits.validation):,} validation images of "
        f"{len(splits.classes)} classes; {len(splits.problems)} left out"
    )
    for note in splits.notes:
        say(printable(note))
    where = f"{processes.device.type}"
    if processes.are_several:
        where = f"{processes.world_size} processes, {where}"
    say(f"{plan.model.num_parameters() / 1e6:.1f} million parameters, {where}\n")
    names = max(len(choice.name) for choice in plan.choices)
    values = max(len(choice.value) for choice in plan.choices)
    for choice in plan.choices:
        say(f"  {choice.name:{names}}  {choice.value:{values}}  {choice.reason}")
    say("")


# ---- doing --------------------------------------------------------------------------------------


def _open(
    options: Options, plan: Plan, processes: Processes, stack: contextlib.ExitStack
) -> tuple[int, MetricsLog | None]:
    """Return how many steps are done, and the log; in all but the first process 0 and None.

    The folder is the first process's: others may be on machines that do not see it.
    """
    if not processes.is_first:
        return 0, None
    try:
        make_folder(options.output)
        log = stack.enter_context(MetricsLog(options.output / METRICS_NAME))  # ours from now on
        progress = open_folder(options.output, plan.settings, options.overwrite)
        log.cut(progress.metrics_size if progress is not None else 0)
    except FinishedRunError:
        return FINISHED, None
    except OSError as error:
        raise UsageError(f"argument --output: {one_line(error)}") from error
    return (progress.step if progress is not None else 0), log


def _train(
    options: Options,
    plan: Plan,
    processes: Processes,
    start: int,
    log: MetricsLog | None,
    stack: contextlib.ExitStack,
) -> tuple[Evaluation, int]:
    """Train to the end; return the last evaluation, and how many images could not be decoded."""
    recipe, splits = plan.recipe, plan.splits
    stack.enter_context(_repeatable())
    trainer = Trainer(
        plan.model.to(processes.device), recipe, plan.processor, plan.dtype, processes
    )
    if start and processes.is_first:
        load_checkpoint(options.output, plan.model, trainer.optimizer)
    if start and processes.are_several:
        _spread_state(trainer)
    interruption = stack.enter_context(Interruption(once=not processes.are_several))
    loading: dict[str, Any] = {
        "resample": plan.processor.resample,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "workers": choose_workers(processes, options.workers),
        "pin_memory": processes.device.type == "cuda",
    }
    try:
        batches = TrainingBatches(
            splits.training, recipe, seed=options.seed, micro_batch=plan.micro_batch,
            first_step=start, **loading,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    validation = EvaluationBatches(splits.validation, recipe, **loading)
    display = Display(recipe.steps, start, processes.is_first)
    stack.callback(display.close)
    run = Run(
        trainer, validation, splits.validation.labels,
        folder=options.output, log=log, settings=plan.settings,
        schedule=Schedule(
            options.evaluate_every or -(-recipe.steps // EVALUATIONS), options.checkpoint_every
        ),
        start=start, display=display, interruption=interruption,
    )  # fmt: skip
    if not start:
        run.save()  # a disk that is too small shows now
    try:
        evaluation = run.finish(batches)
    except torch.OutOfMemoryError as error:
        raise FinetuningError(
            f"{processes.device} has not enough memory for {plan.micro_batch} images at a time; "
            f"try a smaller --micro-batch: {one_line(error)[:200]}"
        ) from error
    undecoded = torch.tensor([len(batches.problems) + len(validation.problems)])
    return evaluation, int(processes.sum(undecoded).item())


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN take only algorithms that give the same bits each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _spread_state(trainer: Trainer) -> None:
    """Give all processes the weights and the momentum that the first one has loaded."""
    with losing_peers():
        for parameter in trainer.model.parameters():
            state = trainer.optimizer.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            # DistributedDataParallel would spread the weights, but only before the first step: too late for
            # an evaluation that comes before it.
            distributed.broadcast(parameter.detach(), 0)
            distributed.broadcast(state["momentum_buffer"], 0)


def _facts(options: Options, plan: Plan, undecoded: int) -> Facts:
    found = versions()
    names = ("bitfast", "python", "torch")
    return Facts(
        name=options.output.resolve().name,
        base=options.model,
        classes=plan.splits.classes,
        data=str(options.data),
        training=len(plan.splits.training),
        left_out=len(plan.splits.problems) + undecoded,
        choices=plan.choices,
        seed=options.seed,
        command=options.command,
        versions={name: found[name] for name in names},
    )


def _say_nothing(*_: Any) -> None:
    pass
