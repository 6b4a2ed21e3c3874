"""The trainer's step on one rank, on random pixels and words: what bench_step.py and bench_checkpoint.py time."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace

from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Batch, Context
from mug.model.presets import Vocabulary, resolve
from mug.run.benchmarks.synthetic import WEIGHTS, synthetic_batch
from mug.run.cluster import hardware
from mug.run.cluster.ahead import Ahead
from mug.run.common.errors import RunError
from mug.run.training.deepspeed_config import load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig
from mug.run.training.step import train_step

WORDS = {"tiny": 2000}  # of the embedded default; BERT's for the others


@dataclass(frozen=True)
class OneRank:
    """A batch, in pinned memory where there is a GPU, and the trainer and model that it is put through."""

    trainer: TrainerConfig
    config: MUGConfig
    vocabulary: Vocabulary
    batch: Batch
    ds_config: dict[str, Any]

    @classmethod
    def start(cls, options: Namespace) -> "OneRank":
        """Start the process group, with `deepspeed`, `preset` and `batch` of the options.

        Raises:
            RunError: there are more ranks.
        """
        if hardware.rank_and_world() != (0, 1):
            raise RunError("this measures one rank; start it with plain python")
        hardware.limit_threads()
        trainer = TrainerConfig(global_batch=options.batch, micro_batch=options.batch)
        config = resolve(MUGConfig(options.preset))
        ds_config = load_deepspeed_config(options.deepspeed, recipe_values(trainer, config.width, world=1))
        hardware.init_distributed()
        vocabulary = Vocabulary(WORDS.get(options.preset, 30522), pad=0, bos=1, eos=2, mask=3)
        batch = synthetic_batch(config, vocabulary, options.batch)
        if torch.cuda.is_available():  # as the trainer's loader does: a copy from other memory waits for the GPU
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return cls(trainer, config, vocabulary, batch, ds_config)

    def model(self) -> MUG:
        return MUG(self.config, Context(vocabulary=self.vocabulary))

    def engine(self, compiled: bool = False) -> Any:
        """Returns DeepSpeed's engine around a new model."""
        model, trainer = self.model(), dataclasses.replace(self.trainer, compile=compiled)
        return build_engine(model, self.ds_config, trainer, parameter_groups(model, trainer))

    def step(self, engine: Any) -> Callable[[], None]:
        """Returns the trainer's step, as a function to call for each; always with the same batch."""
        ahead = Ahead([engine.module.prepare(self.batch)] for _ in itertools.count())

        def step() -> None:
            train_step(engine, ahead.next_step(), WEIGHTS, ahead)

        return step
