"""Shows what the model sees, reconstructs and writes of some held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import Captions, Objective, ObjectiveError, Reconstructs, ShowsAttention, name_of
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.held_out_pairs import PairReader, held_out_shards, images_of
from mug.run.evaluators.sharing import gather_numbered, share
from mug.run.reporting.grid import Picture


@dataclass(frozen=True)
class PicturesConfig(EvalConfig):
    """Pictures of held-out pairs.

    Args:
        count: pairs to show, spread evenly over the set.
    """

    count: int = 8

    def check(self) -> None:
        super().check()
        check_min(self, {"count": 1})


class Pictures(Evaluator):
    """A grid of images and captions in samples/step-N.png of the run's folder. The ranks share the pairs."""

    Config = PicturesConfig

    def __init__(self, config: PicturesConfig, context: EvalContext):
        super().__init__(config, context)
        data, self.pairs = context.pairs, None
        if data and (shards := held_out_shards(data)):
            self.pairs = PairReader.open(replace(data, shards=shards), config.count)

    def check(self, objective: Objective) -> None:
        check_pictured(objective)

    def run(self, subject: Subject) -> Result:
        if self.pairs is None:
            return Result({})
        objective = subject.whole
        pairs = list(self.pairs.read(share(len(self.pairs)), objective.config.image_size))
        rows = []
        if pairs:
            true = [next(iter(pair.captions), "") for pair in pairs]
            position_B = torch.tensor([pair.number for pair in pairs], device=hardware.device())
            rows = draw_rows(objective, self.context.tokenizer, images_of(pairs), position_B, true)
        shown = gather_numbered(zip([pair.number for pair in pairs], rows, strict=True))
        self.pairs.report()
        return Result({}, pictures=shown)


def check_pictured(objective: Objective) -> None:
    """Raise RunError if the objective can neither reconstruct nor caption images."""
    if not isinstance(objective, Reconstructs) and not writes_captions(objective):
        raise RunError(f"objective {name_of(type(objective))} neither reconstructs masked patches nor writes captions")


def writes_captions(objective: Objective) -> bool:
    """Whether this objective, as it is configured and trained, writes captions."""
    if not isinstance(objective, Captions):
        return False
    try:
        objective.check_captions()
    except ObjectiveError:
        return False
    return True


@torch.inference_mode()
def draw_rows(
    objective: Objective,
    tokenizer: Tokenizer | None,
    image_BCHW: Tensor,
    position_B: Tensor,
    true: Sequence[str],
    beams: int = 1,
) -> list[Picture]:
    """Returns rows for uint8 images [B, 3, H, W]: reconstructions and captions, as far as the objective makes them.

    Captions are written from the full image: greedily, and with more than one beam also by beam search. `position_B`,
    int64, decides the masks. An empty string in `true` is a pair without a caption.
    """
    objective.eval()
    images = {"original": image_BCHW}
    if isinstance(objective, Reconstructs):
        images["masked"], images["reconstruction"] = objective.reconstruct(image_BCHW, position_B)
    captions: dict[str, Sequence[str]] = {}
    words: list[tuple[tuple[str, Tensor], ...]] = [()] * len(image_BCHW)
    if writes_captions(objective):
        assert tokenizer is not None  # of the captions that it learned
        for count in sorted({1, beams}):
            author = "written" if count == 1 else f"written, {count} beams"
            tokens_BT = objective.caption(image_BCHW, count)
            captions[author] = [tokenizer.decode(row) for row in tokens_BT[:, 1:].tolist()]
            if count == 1:
                words = _looked_at(objective, tokenizer, image_BCHW, tokens_BT)
    if any(true):
        captions["true"] = true
    return [
        Picture(
            {name: of[i].cpu() for name, of in images.items()},
            {author: texts[i] for author, texts in captions.items()},
            words[i],
        )
        for i in range(len(image_BCHW))
    ]


def _looked_at(
    objective: Objective, tokenizer: Tokenizer, image_BCHW: Tensor, tokens_BT: Tensor
) -> list[tuple[tuple[str, Tensor], ...]]:
    """Returns for each image the words that were written, each with the image as bright as it was looked at."""
    weights_BTN = objective.word_attention(image_BCHW, tokens_BT) if isinstance(objective, ShowsAttention) else None
    if weights_BTN is None:
        return [()] * len(image_BCHW)
    found = []
    for image_CHW, tokens_T, weights_TN in zip(image_BCHW, tokens_BT.tolist(), weights_BTN, strict=True):
        words: list[tuple[str, Tensor]] = []
        for token, weights_N in zip(tokens_T, weights_TN, strict=True):
            piece = tokenizer.decode([token])
            if words and piece.startswith("##"):
                words[-1] = (words[-1][0] + piece[2:], words[-1][1] + weights_N)
            elif piece:
                words.append((piece, weights_N))
        found.append(tuple((word, spotlight(image_CHW, weights_N).cpu()) for word, weights_N in words))
    return found


def spotlight(image_CHW: Tensor, weights_N: Tensor) -> Tensor:
    """Returns the image, uint8 [3, H, W], fading to white where the weights of its patches (in raster order) are less
    than their maximum."""
    side = round(len(weights_N) ** 0.5)
    share_HW = torch.nn.functional.interpolate(
        (weights_N / weights_N.max()).view(1, 1, side, side), size=image_CHW.shape[1:], mode="bilinear"
    )[0, 0]
    return (255 - (255 - image_CHW.float()) * (0.15 + 0.85 * share_HW)).round().to(torch.uint8)
