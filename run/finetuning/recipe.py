"""The recipe of a fine-tuning run, from YAML and the command line. No torch in here."""

import operator
from dataclasses import dataclass
from typing import Literal

from mug.model.presets import ModelConfig, resolve
from mug.run.training.command_line import Parser
from mug.run.training.errors import RunError
from mug.run.training.recipe import (
    RECIPES,
    CheckpointConfig,
    Command,
    SafetyConfig,
    TrainerConfig,
    check_least,
    check_shares,
    parse_recipe,
    recipe_parser,
)

DEFAULT_RECIPE = RECIPES / "finetune" / "fashion_mnist_tiny.yaml"


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder to fine-tune; None takes the preset's value.

    Args:
        preset: tiny, small, base, large or huge.
        image_size: side of the square image, in pixels.
        patch_size: side of a patch, in pixels.
        width: encoder width.
        depth: encoder blocks.
        heads: encoder attention heads.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 at the first.
    """

    preset: str = "base"
    image_size: int | None = None
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    drop_path: float = 0.1

    @property
    def encoder(self) -> ModelConfig:
        """The encoder's sizes, checked.

        Raises:
            ModelConfigError: an unknown preset, or sizes that do not fit together.
        """
        sizes = (self.preset, self.image_size, self.patch_size, self.width, self.depth, self.heads)
        return resolve(ModelConfig(*sizes))


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """An encoder and a linear head.

    Args:
        pool: mean of the patch tokens, or cls, the class token.
    """

    pool: Literal["mean", "cls"] = "mean"


@dataclass(frozen=True)
class LabelledConfig:
    """Where the labelled images come from and how they are looked at.

    Args:
        images: FOLDER (with train/ and val/ or test/), 'SHARDS', fashion-mnist[:FOLDER] or openmoji: see
            run/evaluation/datasets.py.
        test: Images to evaluate on, where `images` does not hold them.
        label: Key of the shards' json, or column of the dataset, that holds the class.
        cache: Folder for what is built once. Without it, $MUG_CACHE, else ~/.cache/mug.
        crop_scale: Least and greatest share of the image's area that a random training crop covers.
        flip: Mirror half of the training images.
        central_share: Side of the central square that is evaluated, as a share of the image's shorter side.
        decode: 'exact' decodes at full size; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 where the crop allows.
        workers: Processes per rank that read, decode and augment; 0 works in the training process itself.
    """

    images: str | None = None
    test: str | None = None
    label: str = "label"
    cache: str | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    central_share: float = 0.875
    decode: Literal["exact", "fast"] = "exact"
    workers: int = 2


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images and their targets; MAE's settings.

    Args:
        rand_augment: timm's name of a RandAugment policy; null does without.
        erase: Share of the images of which a random rectangle is replaced by noise.
        mixup: Alpha of mixup's Beta distribution; 0 does without.
        cutmix: Alpha of CutMix's. With both, each batch is mixed in one of the two ways.
        label_smoothing: Weight that the target spreads evenly over all classes.
    """

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class FinetuneTrainerConfig(TrainerConfig):
    """How the model is trained: AdamW with MAE's settings for ViT-B.

    Args:
        layer_decay: Factor on the learning rate from each layer to the one below it.
        eval_samples: test images to evaluate on; all if there are fewer.
    """

    global_batch: int = 1024
    epochs: float = 100.0
    base_learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = 0.0
    eval_samples: int = 10_000_000
    layer_decay: float = 0.65


@dataclass(frozen=True)
class FinetuneRecipe:
    """One fine-tuning run.

    Args:
        init: Weights to begin with: the folder of a pre-training run or of one of its checkpoints, or a file of an
            encoder in timm's, MAE's or transformers' layout (.safetensors, .pth). Without it, from scratch.
        seed: of the head, the order of the images, crops, augmentation and dropped paths.
    """

    model: ClassifierConfig
    data: LabelledConfig
    augment: AugmentConfig
    trainer: FinetuneTrainerConfig
    checkpoint: CheckpointConfig
    safety: SafetyConfig
    init: str | None = None
    seed: int = 0


def build_parser() -> Parser:
    """The options of run/finetune.py."""
    description = "Fine-tune an encoder end to end on labelled images."
    return recipe_parser("finetune.py", description, FinetuneRecipe, DEFAULT_RECIPE)


RATES = ("model.drop_path", "augment.erase", "augment.label_smoothing")
POSITIVE = ("augment.mixup", "augment.cutmix", "data.workers")


def parse_command(arguments: list[str] | None = None) -> Command:
    """Parse the command line of run/finetune.py.

    Raises:
        RunError: an unknown flag or recipe key, a value of the wrong type or out of range, a missing file.
        ModelConfigError: sizes that do not fit together.
    """
    command = parse_recipe(build_parser(), FinetuneRecipe, DEFAULT_RECIPE, arguments)
    recipe: FinetuneRecipe = command.recipe
    check_least(recipe, dict.fromkeys((*POSITIVE, *RATES), 0))
    for name in RATES:
        if (rate := operator.attrgetter(name)(recipe)) >= 1:
            raise RunError(f"{name} must be less than 1, not {rate}")
    check_shares(recipe, "data.central_share", "trainer.layer_decay")
    data, trainer = recipe.data, recipe.trainer
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise RunError(f"data.crop_scale is {data.crop_scale}; give 0 < least <= greatest <= 1")
    if data.images is None:
        raise RunError("data.images is missing; name the labelled images, for example --data.images imagenet")
    if trainer.micro_batch % 2 and (recipe.augment.mixup or recipe.augment.cutmix):
        raise RunError(f"trainer.micro_batch is {trainer.micro_batch}: mixing pairs images; give an even number")
    recipe.model.encoder  # noqa: B018  checks the sizes
    return command
