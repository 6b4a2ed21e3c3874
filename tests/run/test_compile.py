"""trainer.compile under DeepSpeed: the losses of the same run without it, out of a handful of graphs."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch._dynamo.utils import counters

from mug.model import compiled
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.benchmarks.synthetic import WEIGHTS, synthetic_batch
from mug.run.common.errors import RunError
from mug.run.training.deepspeed_config import load_deepspeed_config
from mug.run.training.engine import build_engine, check_compiler, recipe_values
from mug.run.training.groups import parameter_groups
from mug.run.training.recipe import TrainerConfig
from mug.run.training.step import train_step

ROOT = Path(__file__).parents[2]
VOCABULARY = Vocabulary(50, pad=0, bos=1, eos=2, mask=3)
SIZES = {"width": 32, "depth": 2, "heads": 2, "pixel_width": 32, "pixel_depth": 1, "pixel_heads": 2}
SIZES |= {"text_width": 32, "text_heads": 2, "text_unimodal_layers": 1, "text_cross_layers": 1}
VARIANTS = [  # DeepSpeed configuration, precision, activation_checkpointing, captioning, steps
    ("zero0", "fp32", "none", "autoregressive", 4),
    ("zero1", "bf16", "elementwise", "masked-language", 4),
    ("zero2", "bf16", "blocks", "autoregressive", 4),
    ("zero3", "fp32", "blocks", "masked-language", 4),
    ("zero3", "bf16", "none", "autoregressive", 50),
]
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def batch(config: MUGConfig, step: int) -> dict[str, torch.Tensor]:
    """Four captions of none to all of the tokens."""
    made = synthetic_batch(config, VOCABULARY, 4, seed=step)
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, config.text_length + 1, (4, 1), generator=generator)
    made["tokens"][torch.arange(config.text_length) >= lengths] = VOCABULARY.pad
    return made


def curve(config: MUGConfig, stage: str, steps: int, trainer: TrainerConfig) -> list[dict[str, float]]:
    values = recipe_values(trainer, config.width, world=1)
    torch.manual_seed(0)
    ds_config = load_deepspeed_config(ROOT / f"ds_configs/{stage}.json", values)
    model = MUG(config, Context(vocabulary=VOCABULARY))
    engine = build_engine(model, ds_config, trainer, parameter_groups(model, trainer))
    rows = []
    for step in range(steps):
        micro_batches = [batch(config, 2 * step), batch(config, 2 * step + 1)]
        rows.append(train_step(engine, micro_batches, WEIGHTS).reduce(WEIGHTS))
        assert engine.was_step_applied()
    return rows


def check(rank: int, world: int) -> None:
    compiled.BACKEND = "aot_eager"
    for stage, precision, policy, captioning, steps in VARIANTS:
        torch._dynamo.reset()
        counters.clear()
        config = resolve(MUGConfig(**SIZES, captioning=captioning))
        options = {"global_batch": 8, "micro_batch": 4, "precision": precision, "activation_checkpointing": policy}
        eager, mine = (
            curve(config, stage, steps, TrainerConfig(**options, compile=compile)) for compile in (False, True)
        )
        for step, (row, other) in enumerate(zip(mine, eager, strict=True)):
            for term in ("loss/pixels", "loss/caption"):
                assert row[term] == pytest.approx(other[term], rel=TOLERANCE[precision]), f"{stage}, step {step}"
        # Of the encoder, of the pixel decoder, and of text blocks without and with cross-attention.
        assert counters["stats"]["unique_graphs"] == 4, f"{stage} {precision} {policy}"
        assert not counters["graph_break"], f"{stage} {precision} {policy}"


def test_a_machine_without_compiler_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RunError, match=r"trainer.compile needs a C\+\+ compiler"):
        check_compiler(TrainerConfig(compile=True))
    check_compiler(TrainerConfig())


@pytest.mark.slow
def test_every_stage_and_precision_trains_compiled_without_compiling_again():
    run_ranks(check, 1)
