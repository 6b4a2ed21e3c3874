"""The trainer's step on one rank, on random pixels and words: what bench_step.py and bench_checkpoint.py time."""

from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from mug.model.mug import MUG, Batch
from mug.model.presets import ModelConfig, Vocabulary, resolve
from mug.run.benchmarks.synthetic import WEIGHTS, synthetic_batch
from mug.run.training import hardware
from mug.run.training.deepspeed_config import load_deepspeed_config
from mug.run.training.engine import build_engine, recipe_values
from mug.run.training.errors import RunError
from mug.run.training.loop import train_step
from mug.run.training.recipe import TrainerConfig

WORDS = {"tiny": 2000}  # of the embedded default; BERT's for the others


@dataclass(frozen=True)
class OneRank:
    """A batch, and the trainer and model that it is put through."""

    trainer: TrainerConfig
    config: ModelConfig
    vocabulary: Vocabulary
    batch: Batch
    ds_config: dict[str, Any]

    @classmethod
    def start(cls, options: Namespace) -> "OneRank":
        """The process group, and what `deepspeed`, `preset` and `batch` of the options say.

        Raises:
            RunError: there are more ranks.
        """
        if hardware.rank_and_world() != (0, 1):
            raise RunError("this measures one rank; start it with plain python")
        hardware.use_cores()
        trainer = TrainerConfig(global_batch=options.batch, micro_batch=options.batch)
        config = resolve(ModelConfig(options.preset))
        ds_config = load_deepspeed_config(options.deepspeed, recipe_values(trainer, config.width, world=1))
        hardware.init_distributed()
        vocabulary = Vocabulary(WORDS.get(options.preset, 30522), pad=0, bos=1, eos=2, mask=3)
        return cls(trainer, config, vocabulary, synthetic_batch(config, vocabulary, options.batch), ds_config)

    def model(self) -> MUG:
        return MUG(self.config, self.vocabulary)

    def engine(self) -> Any:
        """DeepSpeed's engine around a model of its own."""
        return build_engine(self.model(), self.ds_config, self.trainer)

    def step(self, engine: Any) -> None:
        """The trainer's step."""
        train_step(engine, [self.batch], WEIGHTS)
