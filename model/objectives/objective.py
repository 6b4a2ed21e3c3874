"""The contract between an objective and the system that trains, evaluates and exports it.

An objective is one file of this folder, found by its name; see CONTRIBUTING.md. Dimension letters: B batch, N patches,
D width, T tokens, E size of an embedding.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from mug.model.batch_norm import batch_norm_state, load_batch_norm_state
from mug.model.encoder import Encoder
from mug.model.presets import Vocabulary

Batch = dict[str, Tensor]  # of a run over several kinds, it has its `kind`
Losses = dict[str, Tensor]  # fp32 scalars, by the loss's name
Metrics = dict[str, Tensor]  # detached scalars to log, named kind/LOSS: means over what LOSS counts


class ObjectiveError(ValueError):
    """An objective that does not exist, or cannot do what is asked; one line."""


def with_tensors(batch: Batch, tensors: Mapping[str, Tensor]) -> Batch:
    """Returns the batch, still of its kind, with further tensors."""
    found = copy.copy(batch)
    found |= tensors
    return found


@dataclass(frozen=True)
class Context:
    """What the data and the recipe decide, and an objective's own configuration cannot.

    seed: fixes, with a sample's position, every random choice about it.
    vocabulary: of the captions' tokenizer, where the data have captions.
    class_names: of labelled data.
    losses: the names of those that have a weight; only these are computed. () means all.
    """

    seed: int = 0
    vocabulary: Vocabulary | None = None
    class_names: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A random crop that a sample is seen in, further ones being cut from the same decoded image, and its colours.

    The data's readers crop and flip; the rest is done on the device: see `mug.model.augment`.

    crop_scale: min and max share of the image's area. flip: mirror half of the crops.
    jitter: max change of brightness, contrast, saturation (factors 1 ± change) and hue (turns); jitter_share: of the
        crops to change so.
    grey, blur, solarize: share of the crops to turn to grey, to blur by a Gaussian, and to invert where bright.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_share: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


class Objective(nn.Module):
    """What is learned: `losses, metrics = objective(batch)`."""

    Config: ClassVar[type]  # a frozen dataclass, see mug.model.presets: the recipe's section `model`, and --help
    losses: ClassVar[dict[str, float]]  # names, and weights unless the recipe gives others
    kinds: ClassVar[tuple[str, ...]] = ("pairs",)  # of batch: names of files in data/kinds/
    zero3_leaves: ClassVar[tuple[type[nn.Module], ...]] = ()  # modules that ZeRO-3 gathers with one exchange each
    couples_in_forward: ClassVar[bool] = False  # a forward pass mixes its samples, by a batch norm for example
    teachers: ClassVar[dict[str, str]] = {}  # paths of modules and of those they follow: see mug.model.momentum
    frozen: ClassVar[tuple[str, ...]] = ()  # paths of modules that stay as drawn, though the optimizer has them
    constant_rate: ClassVar[tuple[str, ...]] = ()  # and of those that learn at the peak rate from first to last
    encoder: Encoder  # what is evaluated, fine-tuned and exported

    def __init__(self, config: Any, context: Context):
        """`config` is a resolved `Config` (see `presets.resolve`)."""
        super().__init__()
        self.config, self.context = config, context

    @property
    def vocabulary(self) -> Vocabulary:
        """Returns the tokenizer's; only for objectives whose data have one."""
        assert self.context.vocabulary is not None
        return self.context.vocabulary

    @property
    def active(self) -> tuple[str, ...]:
        """Returns the losses that are computed."""
        return self.context.losses or tuple(self.losses)

    @classmethod
    def views(cls, config: Any) -> tuple[View, ...]:
        """Returns the crops of a sample that a batch holds as `views`, uint8 [B, V, 3, H, W]; () for one `image`."""
        return ()

    @property
    def reads_captions(self) -> bool:
        """Whether this model learns less from samples without a caption."""
        return hasattr(self.config, "text_length")

    def prepare(self, batch: Batch) -> Batch:
        """Returns the batch, still on the host, with what `forward` would otherwise wait for on a GPU."""
        return batch

    def forward(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Returns the losses of a micro-batch, each a mean over what `counts` counts, and metrics."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of terms that each active loss is a mean over; 0 if this kind of batch lacks the loss."""
        raise NotImplementedError

    def flops(self, batch: Batch) -> float:
        """Returns the FLOP of this micro-batch, forward and backward; see mug.model.flops for the conventions."""
        raise NotImplementedError

    def after_step(self, samples: int) -> None:
        """Called on all ranks after each applied optimizer step, with the samples seen so far."""

    def momentum_at(self, progress: float) -> float:
        """Returns the share of a teacher's average that a step keeps, at `progress` (0 to 1) through training."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Tensor]:
        """Returns fp32 tensors outside the optimizer for checkpoints, equal on all ranks: batch norms' statistics."""
        return batch_norm_state(self)

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `extra_state` returned."""
        load_batch_norm_state(self, state)

    def adopt(self, encoder: Encoder) -> None:
        """Begin with the weights of `encoder`, which has this encoder's sizes (the recipe's `init`); with its positions
        where this one learns them."""
        state = encoder.state_dict() | {"positions_ND": encoder.positions_ND}
        self.encoder.load_state_dict({name: state[name] for name in self.encoder.state_dict()})


class CoupledObjective(Objective):
    """An objective whose losses couple the samples of a group, as in-batch negatives and batch norms do.

    `forward` composes the three methods below. Where a group has several micro-batches, the trainer calls them in two
    passes instead, so that the coupled losses are exact over the entire group (see mug.run.cluster.coupled): per
    micro-batch `features`, then `coupled_losses` once for this rank's rows of the group. So the three must agree from
    call to call: their random choices are functions of (seed, position), and batch norms are `BatchNorm`.
    """

    def shared(self, batch: Batch) -> tuple[str, ...]:
        """Returns the names of small tensors [B, ...] that `prepare` needs of the entire group, in any order: the batch
        has them as `group/NAME` [M, ...]. None of a batch that is prepared; where a batch lacks them, it is alone."""
        return ()

    def draws(self, batch: Batch) -> bool:
        """Whether training draws something of such a batch by the features of its group, which `draw` does: then the
        trainer takes two passes even where a group is one micro-batch."""
        return False

    def draw(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors [B, ...] by name, with which `prepare` prepares a batch once more for the second pass; of
        this rank's rows of the group, end to end, as `coupled_losses` has them. May gather those of all ranks."""
        raise NotImplementedError

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """Returns (tensors [B, ...] by name, each row a sample's own; what else `own_losses` needs).

        Those that are floating are learned; others, such as which samples have a caption, are integers or bool. An
        encoder is called once: concatenate the views. {} where this kind of batch has no coupled loss.
        """
        raise NotImplementedError

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        """Returns means over this rank's rows, against the rows of all ranks, in fp32 from where samples meet.

        The features of its micro-batches, end to end. A module that is called twice here must not be a ZeRO-3 leaf.
        """
        raise NotImplementedError

    def own_losses(self, batch: Batch, rest: Any) -> tuple[Losses, Metrics]:
        """Returns the losses of which each sample has its own part."""
        return {}, {}

    def forward(self, batch: Any, part: Callable[..., Any] | None = None) -> Any:
        """Returns (losses, metrics) of a group that is one micro-batch; or `part(self, batch)`.

        The trainer reaches the other methods through `part`: under ZeRO-3, parameters of the objective itself are there
        only in its forward.
        """
        if part is not None:
            return part(self, batch)
        features, rest = self.features(batch)
        losses, metrics = self.own_losses(batch, rest)
        coupled, coupled_metrics = self.coupled_losses(features) if features else ({}, {})
        return losses | coupled, metrics | coupled_metrics


# --- Abilities: commands and evaluators ask for them, never for a name --------------------------------------


@runtime_checkable
class EmbedsPairs(Protocol):
    """Embeds images and captions in one space."""

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        """Returns fp32 [B, E] of unit length, of uint8 images [B, 3, H, W]."""

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        """Returns fp32 [B, E] of unit length, of int64 tokens [B, T], BOS … EOS PAD."""


@runtime_checkable
class Captions(Protocol):
    """Writes captions."""

    def check_captions(self) -> None:
        """Raise ObjectiveError where this model's configuration or losses leave it unable to."""

    def caption(self, image_BCHW: Tensor, beams: int = 1) -> Tensor:
        """Returns int64 [B, T], BOS … EOS PAD, of uint8 images [B, 3, H, W]; one beam is greedy."""


@runtime_checkable
class CaptionsInLanguages(Captions, Protocol):
    """Writes captions in several languages."""

    def languages(self) -> tuple[str, ...]:
        """Returns the languages that it writes in; empty where its tokenizer has no language tokens."""

    def caption(self, image_BCHW: Tensor, beams: int = 1, language: int = 0) -> Tensor:
        """Returns captions in the language of this number, int64 [B, T], BOS … EOS PAD."""


@runtime_checkable
class Translates(Protocol):
    """Translates texts, with an image or without."""

    def languages(self) -> tuple[str, ...]:
        """Returns the languages that it writes in."""

    def check_translations(self) -> None:
        """Raise ObjectiveError where this model's losses leave it unable to."""

    def translate(self, source_BT: Tensor, language: int, beams: int = 1, image_BCHW: Tensor | None = None) -> Tensor:
        """Returns texts in the language of this number, int64 [B, T], BOS … EOS PAD; one beam is greedy.

        Args:
            source_BT: int64, BOS … EOS LANGUAGE PAD.
            image_BCHW: uint8 [B, 3, H, W], an image of each text.
        """


@runtime_checkable
class EmbedsSentences(Protocol):
    """Embeds texts of different languages in one space."""

    def embed_sentence(self, tokens_BT: Tensor) -> Tensor:
        """Returns fp32 [B, E] of unit length, of int64 tokens [B, T], BOS … EOS LANGUAGE PAD."""


@runtime_checkable
class CaptionsVisible(Protocol):
    """Writes captions of the patches that a mask leaves visible."""

    def caption_visible(self, image_BCHW: Tensor, position_B: Tensor, beams: int = 1) -> Tensor:
        """Returns int64 [B, T], BOS … EOS PAD, of uint8 images [B, 3, H, W]; int64 `position_B` decides the masks."""


@runtime_checkable
class ShowsAttention(Protocol):
    """Shows where in the image it looks for each word."""

    def word_attention(self, image_BCHW: Tensor, tokens_BT: Tensor) -> Tensor | None:
        """Returns fp32 [B, T, N] over the patches in raster order; None if no layer looks at the image."""


@runtime_checkable
class Reconstructs(Protocol):
    """Reconstructs the patches that it does not see."""

    def reconstruct(self, image_BCHW: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns uint8 (masked, reconstruction), [B, 3, H, W] each; int64 `position_B` decides the masks."""


@runtime_checkable
class ScoresCaptions(Protocol):
    """Scores how likely captions of an image are."""

    def check_captions(self) -> None:
        """Raise ObjectiveError where this model's configuration or losses leave it unable to."""

    def caption_log_likelihoods(self, image_BCHW: Tensor, tokens_CT: Tensor) -> Tensor:
        """Returns fp32 [B, C], nats, of uint8 images [B, 3, H, W] and int64 captions [C, T], BOS … EOS PAD."""


@runtime_checkable
class TakesLanguageModel(Protocol):
    """Begins with the weights of a language model."""

    def load_language_model(self, state: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Load weights of transformers' layout; `settings` is their config.json.

        Raises:
            ModelConfigError: they are of another size, or of a model that computes something else.
        """


@runtime_checkable
class AnswersQuestions(Protocol):
    """Answers questions about images."""

    def answer(self, image_BCHW: Tensor, tokens_ST: Tensor) -> Tensor:
        """Returns fp32 logits [S, K] over the answers, of uint8 images [B, 3, H, W] and int64 questions [S, T], S a
        multiple of B: question s is about image s mod B."""


@runtime_checkable
class KnowsFloors(Protocol):
    """Knows the losses of a model that ignores its inputs."""

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Returns int64 [K] by loss: the classes that it predicts, of those losses that predict classes."""

    def chance(self, samples: int) -> dict[str, float]:
        """Returns the losses that find a sample among those of its group by chance, of a group of so many samples."""


# --- Found by file name -------------------------------------------------------------------------------------


def objective_names() -> list[str]:
    """Returns the names of all objectives: the files of this folder that define one."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in names if name not in ("objective",))


def find_objective(name: str) -> type[Objective]:
    """Returns the objective that the file NAME.py of this folder defines.

    Raises:
        ObjectiveError: it does not exist; the message lists those that do.
    """
    if name not in objective_names():
        raise ObjectiveError(f"objective {name!r} is not one of {', '.join(objective_names())}")
    module = importlib.import_module(f"mug.model.objectives.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found


def name_of(objective: type[Objective]) -> str:
    """Returns the name of an objective: that of its file."""
    return objective.__module__.rpartition(".")[2]
