"""The start of a run, from its command to the loop: the same for every objective and kind of batch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist

from mug.data import mixture
from mug.data.bad_samples import BadSampleLog
from mug.data.caption_check import caption_warnings
from mug.data.config import DataConfig
from mug.data.crops import ViewConfig
from mug.data.kinds.pairs import Pairs
from mug.data.kinds.samples import Samples, Shape
from mug.data.stream import BatchShard, TrainStream
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import Objective, find_objective, name_of
from mug.run.cluster import hardware, lost_ranks
from mug.run.cluster.rank_monitor import RankMonitor
from mug.run.common.console import Console
from mug.run.common.errors import RunError
from mug.run.common.output import check_writable, lock
from mug.run.evaluators.evaluator import EvalConfig, EvalContext, Evaluator, find_evaluator
from mug.run.state import checkpoint
from mug.run.state.checkpoint import Checkpoint
from mug.run.state.initial import initialize, parts_of
from mug.run.state.restore import build_objective, describe_model, load_engine
from mug.run.state.sharded_state import SavedState, load_weights
from mug.run.training.apex import check_apex
from mug.run.training.deepspeed_config import check_batch, load_deepspeed_config
from mug.run.training.engine import build_engine, check_compiler, recipe_values
from mug.run.training.groups import freeze, parameter_groups
from mug.run.training.loop import Run, log_summary, train
from mug.run.training.metrics import logged_losses
from mug.run.training.recipe import Command, Recipe, changes, count_steps, flat, parse_command
from mug.run.training.spikes import SpikeAlarm
from mug.run.training.startup_timer import StartupTimer

Description = dict[str, dict[str, Any]]  # what identifies a model, in sections


def train_command(console: Console, prog: str, description: str, default: Path) -> None:
    """Parse the command line of a command that trains, and train; without --config, the recipe is `default`."""
    # --- Parse: all that can be refused is refused here, before anything is written ---
    phases = StartupTimer()
    phases.end("imports")
    command = parse_command(prog, description, default).on_ranks(hardware.rank_and_world()[1])
    recipe = command.recipe
    shard, ds_config = load_configs(command, phases)

    # --- Data ---
    stream, held_out = open_stream(recipe, shard), open_held_out(recipe)
    steps = count_steps(recipe.trainer, stream.samples)
    phases.end("data")

    with distributed_session(console, recipe.faults.hang_minutes, phases) as monitor:
        # --- Model, and the newest intact checkpoint, if this output has one of this model ---
        begun = begin_counting_losses(command.output, monitor)
        model = build_model(recipe, stream.source, begun, console)
        check_captions(model, stream.source, console)
        context = eval_context(recipe, stream.source.tokenizer, lambda: held_out, command.output, console)
        evaluators = open_evaluators(recipe.evals, dataclasses.replace(context, progress=monitor.progress), model)
        phases.end("model")
        identity = describe_model(model)
        resumed = claim_output(command, identity, console, phases)

        # --- Engine, data and bad samples as they were then ---
        engine = start_engine(model, ds_config, recipe, resumed, phases)
        if resumed:
            stream.load_state_dict(resumed.manifest["data"], command.allow_changes)

        # --- Loop ---
        run = Run(
            command=command,
            engine=engine,
            description=identity,
            files=stream.source.files(),
            stream=stream,
            bad_samples=open_bad_sample_log(command, stream, resumed),
            spikes=open_spike_alarm(command, resumed),
            evaluators=evaluators,
            steps=steps,
            console=console,
            phases=phases,
            monitor=monitor,
        )
        log_summary(run, resumed)
        if recipe.init and not begun:
            for part, path in parts_of(recipe.init).items():
                console.info(f"the {part} starts from the weights of {path}")
        train(run, resumed)


def load_configs(command: Command, phases: StartupTimer) -> tuple[BatchShard, dict[str, Any]]:
    """Returns this rank's share of each batch, and DeepSpeed's configuration.

    Raises:
        RunError, DeepSpeedConfigError: a mistake that shows before anything is written.
    """
    recipe, trainer = command.recipe, command.recipe.trainer
    rank, world = hardware.rank_and_world()
    hardware.limit_threads()
    check_batch(trainer.global_batch, trainer.micro_batch, world)
    phases.end("parse")
    import deepspeed  # noqa: F401  it takes seconds, which a mistake above need not wait for

    phases.end("import_deepspeed")
    ds_config = load_deepspeed_config(command.deepspeed, recipe_values(trainer, recipe.model.width, world))
    check_apex(trainer, ds_config)
    check_compiler(trainer)
    check_writable(command.output)
    share = BatchShard(trainer.global_batch, trainer.micro_batch, rank, world, trainer.groups)
    check_groups(recipe, share)
    return share, ds_config


def check_groups(recipe: Recipe, share: BatchShard) -> None:
    """Raise RunError where a forward pass mixes its samples, as batch norms do, and a group has several of them: the
    curve would depend on the number of ranks."""
    if find_objective(recipe.objective).couples_in_forward and share.accumulation > 1:
        raise RunError(
            f"objective {recipe.objective} needs a group's samples in one forward pass; here a group of {share.group}"
            f" takes {share.accumulation}: set trainer.groups {share.accumulation * share.groups}, or a larger"
            " trainer.micro_batch"
        )


def open_stream(recipe: Recipe, share: BatchShard) -> TrainStream:
    """Returns the training stream of this rank."""
    return mixture.open_stream(recipe.streams, recipe.seed, shape_of(recipe), share)


def open_held_out(recipe: Recipe) -> dict[str, Samples]:
    """Returns the held-out samples of the streams that have some, by name; a single stream has the name ""."""
    return mixture.open_held_out(recipe.streams, shape_of(recipe))


def shape_of(recipe: Recipe) -> Shape:
    """Returns what the model asks of its samples."""
    views = find_objective(recipe.objective).views(recipe.model)
    crops = tuple(ViewConfig(view.crop_scale, view.flip) for view in views)
    return Shape(recipe.model.image_size, getattr(recipe.model, "text_length", None), crops)


def begin_counting_losses(output: Path, monitor: RankMonitor) -> bool:
    """Give the monitor the count of lost ranks of earlier starts; returns whether the run has a checkpoint."""
    folders, losses = hardware.on_rank_zero(lambda: (checkpoint.list_folders(output), lost_ranks.read(output)))
    monitor.count_losses(output, losses, checkpoint.step_of(folders[0]) if folders else 0)
    return bool(folders)


def build_model(recipe: Recipe, source: Samples, begun: bool, console: Console) -> Objective:
    """Returns the objective with freshly drawn weights, the same on all ranks and for all ZeRO stages; unless the run
    has `begun`, its parts with those of the recipe's `init`. Parts of rate 0 are frozen."""
    torch.manual_seed(recipe.seed)
    model = build_objective(recipe.objective, recipe.model, recipe.context(source))
    if recipe.init and not begun:
        initialize(model, recipe.init, console.warn)
    freeze(model, recipe.rates)
    return model


def check_captions(model: Objective, source: Samples, console: Console) -> None:
    """Warn, from rank 0, where the objective reads captions and few samples have one that can be read."""
    if console.rank or not model.reads_captions:
        return
    for one in source.streams.values() if isinstance(source, mixture.Mixture) else [source]:
        for line in caption_warnings(one.reader, one.languages) if isinstance(one, Pairs) else ():
            console.warn(f"objective {name_of(type(model))} reads captions, and {line}")


def eval_context(
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    open_held_out: Callable[[], dict[str, Samples]],
    output: Path,
    console: Console,
) -> EvalContext:
    """Returns the context of the evaluations of a run with this recipe."""
    configs = [stream.config for stream in recipe.streams.values()]
    pairs = (one for one in configs if isinstance(one, DataConfig) and (one.held_out or not one.shards))
    return EvalContext(
        open_held_out=open_held_out,
        pairs=next(pairs, None),
        tokenizer=tokenizer,
        loss_weights=recipe.active_losses,
        micro_batch=recipe.trainer.micro_batch,
        group=recipe.trainer.global_batch // recipe.trainer.groups,
        max_samples=recipe.trainer.eval_samples,
        workers=recipe.workers,
        cache=configs[0].cache,
        output=output,
        console=console,
    )


def open_evaluators(configs: Mapping[str, EvalConfig], context: EvalContext, model: Objective) -> dict[str, Evaluator]:
    """Returns the evaluations of these names.

    Raises:
        RunError, ObjectiveError: one that does not suit this objective.
        DataError: data that are missing or damaged.
    """
    evaluators = {name: find_evaluator(name)(config, context) for name, config in configs.items()}
    for evaluator in evaluators.values():
        evaluator.check(model)
    return evaluators


# --- What went wrong so far -------------------------------------------------------------------------------


def open_bad_sample_log(command: Command, stream: TrainStream, resumed: Checkpoint | None) -> BadSampleLog:
    """Returns the run's list of samples that could not be used; rank 0 keeps it."""
    # Kinds that refuse a bad sample, as labelled images do, have no limits.
    config = next(iter(command.recipe.streams.values())).config
    limits = (getattr(config, name, 1.0) for name in ("max_bad_fraction", "max_bad_fraction_in_shard"))
    log = BadSampleLog(command.output / "bad_samples.jsonl", *limits)
    state = resumed.manifest["data"]["bad_samples"] if resumed else log.state_dict()
    hardware.on_rank_zero(lambda: log.load_state_dict(state))
    return log


def open_spike_alarm(command: Command, resumed: Checkpoint | None) -> SpikeAlarm:
    """Returns the alarm for loss spikes, which knows the losses up to the step that the run resumes after."""
    last = resumed.step if resumed else 0
    losses = hardware.on_rank_zero(lambda: logged_losses(command.output, last))
    return SpikeAlarm(command.recipe.faults.spike_factor, losses)


# --- Ranks, folder and engine -----------------------------------------------------------------------------


@contextlib.contextmanager
def distributed_session(console: Console, hang_minutes: float, phases: StartupTimer) -> Iterator[RankMonitor]:
    """Opens the process group, whose ranks monitor each other until all have left the `with` block."""
    hardware.init_distributed(timeout=timedelta(minutes=hang_minutes + 5))
    phases.end("process_group")
    with RankMonitor(console, 60 * hang_minutes) as watch:
        yield watch
        dist.barrier()
    dist.destroy_process_group()


def claim_output(
    command: Command, description: Description, console: Console, phases: StartupTimer
) -> Checkpoint | None:
    """Lock the run's folder, log there, and find the checkpoint to resume from, if there is one.

    Raises:
        RunError: another run holds the folder; or the checkpoint is not of this run, see `find_checkpoint`.
    """
    hardware.on_rank_zero(lambda: lock(command.output))
    resumed = hardware.on_rank_zero(lambda: find_checkpoint(command, description, console))
    console.log_to(command.output / "logs" / f"rank{dist.get_rank()}.log")
    phases.end("find_checkpoint")
    return resumed


def find_checkpoint(command: Command, description: Description, console: Console) -> Checkpoint | None:
    """Returns the checkpoint to resume from, of any number of ranks and any ZeRO stage.

    Raises:
        RunError: it is of a model that is not as in `description`, of another global batch, or of a recipe in which
            something else was to be learned.
    """
    found = checkpoint.resume(command.output, console.warn)
    if found is None:
        return None
    check_model(found, description, command.recipe.trainer.global_batch)
    check_changes(command, found, console)
    return found


# What a model's description repeats of the recipe, which `check_changes` compares; and the name of its sizes.
OF_THE_RECIPE = ("config.preset", "context.seed", "context.losses")


def check_model(found: Checkpoint, description: Description, global_batch: int) -> None:
    """Raise RunError unless the checkpoint is of a model as in `description`, trained with this global batch."""
    theirs, ours = flat(found.manifest["model"]), flat(description)
    for name in {**theirs, **ours}:
        was, now = theirs.get(name), ours.get(name)
        if name not in OF_THE_RECIPE and was != now:
            raise RunError(
                f"{found.folder} is a checkpoint of another model: {name} is {_apart(was, now)} there,"
                f" {_apart(now, was)} here; restore the recipe, or choose another --output"
            )
    theirs = found.manifest["recipe"]["trainer"]["global_batch"]
    if theirs != global_batch:
        raise RunError(
            f"{found.folder} was written with global batch {theirs}, this run has {global_batch}; restore it,"
            " or choose another --output"
        )


def _apart(value: Any, other: Any) -> str:
    """Returns the value for a message; of a list, from where it differs from the other one."""
    if not (isinstance(value, list) and isinstance(other, list)):
        return shorten(str(value), 60)
    same = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
    return f"of {len(value)}, from number {same + 1} on: {shorten(', '.join(map(str, value[same:])) or 'none', 60)}"


def check_changes(command: Command, found: Checkpoint, console: Console) -> None:
    """Raise RunError where the recipe's keys that decide what is learned have changed, unless that is allowed."""
    if not (changed := changes(found.manifest["recipe"], command.recipe)):
        return
    line = f"{found.folder} was trained with {', '.join(changed)}"
    if not command.allow_changes:
        raise RunError(f"{line}; change back, choose another --output, or resume with --allow_changes true")
    console.warn(line)


def start_engine(
    model: Objective,
    ds_config: dict[str, Any],
    recipe: Recipe,
    resumed: Checkpoint | None,
    phases: StartupTimer,
) -> Any:
    """Returns DeepSpeed's engine around the model, in the state of the checkpoint if any; see `build_engine`."""
    if resumed:
        load_weights(model, SavedState(resumed.folder))
    phases.end("load_weights")
    engine = build_engine(model, ds_config, recipe.trainer, parameter_groups(model, recipe.trainer, recipe.rates))
    phases.end("engine")
    if resumed:
        load_engine(engine, resumed)
    phases.end("load_optimizer")
    return engine
