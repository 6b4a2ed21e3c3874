"""The recipe of a segmentation run, from YAML and the command line. No torch in here."""

from dataclasses import dataclass, field
from pathlib import Path

from mug.run.finetuning.recipe import EncoderConfig
from mug.run.training.command_line import Parser
from mug.run.training.errors import RunError
from mug.run.training.recipe import RECIPES, check_least, check_shares, read_recipe

DEFAULT_RECIPE = RECIPES / "segment" / "scenes_tiny.yaml"


@dataclass(frozen=True)
class SegmenterConfig(EncoderConfig):
    """An encoder and UperNet on it.

    Args:
        image_size: side of the square that the model sees, in pixels.
        classes: number of classes.
        channels: UperNet's.
    """

    image_size: int = 512
    classes: int = 150
    channels: int = 768


@dataclass(frozen=True)
class SceneConfig:
    """Where the scenes come from and how they are looked at.

    Args:
        folder: images/ and annotations/, each with training/ and validation/, as ADE20K has them: JPEG or PNG, and
            PNG of one byte a pixel, 255 not counting. Without it, OpenMoji's drawings, composed.
        reduce_zero_label: Annotations say 0 where nothing is labelled and number the classes from 1, as ADE20K's.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        scale: Least and greatest factor on the image, whose shorter side is model.image_size before, in training.
        category_share: A training crop is drawn anew, up to ten times, while one class has more than this share.
        flip: Mirror half of the training images.
        distort: Change brightness, contrast, saturation and hue in training, each of half of the images.
        workers: Processes per rank that read and change images; 0 works in the training process itself.
    """

    folder: str | None = None
    reduce_zero_label: bool = False
    cache: str | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    category_share: float = 0.75
    flip: bool = True
    distort: bool = True
    workers: int = 2


@dataclass(frozen=True)
class SegmentTrainerConfig:
    """How the model is trained: AdamW with mmsegmentation's settings for MAE's ViT-B.

    Args:
        global_batch: images of one optimizer step, over all ranks and accumulation steps.
        micro_batch: images that one rank puts through the model at once.
        max_steps: optimizer steps of the run.
        learning_rate: AdamW's peak; from there it falls along a straight line to 0.
        warmup_samples: images over which the learning rate rises linearly.
        weight_decay: not on norms, biases, tokens and positions.
        betas: AdamW's.
        layer_decay: Factor on the learning rate from each layer to the one below it.
        log_every: steps between two rows of metrics.
        eval_every: steps between two evaluations on validation images; also at the end.
        eval_samples: validation images to evaluate on; all if there are fewer.
    """

    global_batch: int = 16
    micro_batch: int = 2
    max_steps: int = 160_000
    learning_rate: float = 1e-4
    warmup_samples: int = 24_000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.65
    log_every: int = 50
    eval_every: int = 16_000
    eval_samples: int = 10_000_000


@dataclass(frozen=True)
class SegmentCheckpointConfig:
    """When the run's state is saved.

    Args:
        every_steps: steps between two checkpoints; also at the end.
        keep: how many of the newest to keep.
    """

    every_steps: int = 8_000
    keep: int = 2


@dataclass(frozen=True)
class SegmentRecipe:
    """One segmentation run.

    Args:
        init: Weights to begin with: the folder of a pre-training run or of one of its checkpoints, or a file of an
            encoder in timm's, MAE's or transformers' layout (.safetensors, .pth). Without it, from scratch.
        loss_weights: factor of each term in the total loss.
        seed: of the heads, the order of the images, crops, colours and dropped paths.
    """

    model: SegmenterConfig
    data: SceneConfig
    trainer: SegmentTrainerConfig
    checkpoint: SegmentCheckpointConfig
    init: str | None = None
    loss_weights: dict[str, float] = field(default_factory=lambda: {"segments": 1.0, "auxiliary": 0.4})
    seed: int = 0


@dataclass(frozen=True)
class SegmentCommand:
    """What the command line says: the recipe, and the folder of the run."""

    recipe: SegmentRecipe
    output: Path


# What a number must at least be.
LEAST = {
    **{f"trainer.{name}": 1 for name in ("max_steps", "log_every", "eval_every", "eval_samples")},
    **{f"trainer.{name}": 0 for name in ("learning_rate", "warmup_samples", "weight_decay")},
    **{"checkpoint.every_steps": 1, "checkpoint.keep": 1, "seed": 0},
    **{"model.drop_path": 0, "model.channels": 1, "model.classes": 2, "data.workers": 0},
}


def build_parser() -> Parser:
    """The options of run/segment.py."""
    parser = Parser(prog="segment.py", description="Fine-tune an encoder with UperNet on labelled pixels.")
    parser.add_argument("--config", action="config", help=f"recipe, a YAML file (default: {DEFAULT_RECIPE.name})")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the run (runs/RECIPE)")
    parser.add_class_arguments(SegmentRecipe, as_group=False)
    return parser


def parse_command(arguments: list[str] | None = None) -> SegmentCommand:
    """Parse the command line of run/segment.py.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type or out of range, a missing file.
        ModelConfigError: sizes that do not fit together.
    """
    recipe, _, output = read_recipe(build_parser(), SegmentRecipe, DEFAULT_RECIPE, arguments)
    check_least(recipe, LEAST)
    check_shares(recipe, "data.category_share", "trainer.layer_decay")
    scale = recipe.data.scale
    if not 0 < scale[0] <= scale[1]:
        raise RunError(f"data.scale is {scale}; give 0 < least <= greatest")
    if recipe.model.drop_path >= 1:
        raise RunError(f"model.drop_path must be less than 1, not {recipe.model.drop_path}")
    if recipe.model.classes > 255:
        raise RunError(f"model.classes is {recipe.model.classes}; labels are bytes, and 255 does not count")
    if set(recipe.loss_weights) != {"segments", "auxiliary"}:
        raise RunError(f"loss_weights names {', '.join(recipe.loss_weights)}; it must name segments and auxiliary")
    recipe.model.encoder  # noqa: B018  checks the sizes
    return SegmentCommand(recipe, output)
