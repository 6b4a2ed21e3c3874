"""Zero-shot classification by the names of the classes, as in CLIP (arXiv 2103.00020, section 3.1).

Dimension letters: M images, C classes, E size of an embedding, T tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mug.data.builders import fashion_mnist
from mug.data.captions import TEXT_LANGUAGE
from mug.data.labelled_sources import Source, open_fashion_mnist, open_openmoji, open_source
from mug.data.order import spread
from mug.data.store.expand import without_signatures
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.objective import EmbedsPairs, Objective
from mug.run.common.command_line import check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalConfig, EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.features import Features, extract_shared
from mug.run.evaluators.held_out_pairs import tokens_of
from mug.run.evaluators.sharing import gather_rows, share, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(EvalConfig):
    """Images to classify by the names of their classes.

    Args:
        data: the images: FOLDER of a folder per class or of a saved dataset, 'SHARDS', fashion-mnist[:FOLDER] or
            openmoji, of these two the test images: see data/labelled_sources.py.
        label: key of the shards' json, or column of the dataset, that holds the class.
        names: JSON file of an object that gives each class its name; all its classes are candidates. Without it, the
            classes of the images go by their labels, `_` read as a space.
        templates: captions of an image of a class, with {} for its name; embeddings are averaged over them.
        limit: images to take, spread evenly over the set; without it, all.
    """

    data: str
    label: str = "label"
    names: str | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)
    limit: int | None = None

    def check(self) -> None:
        super().check()
        check_min(self, {"limit": 1})
        if not self.templates or any("{}" not in template for template in self.templates):
            raise RunError("templates must each have {} for the name of the class, such as 'a photo of a {}.'")


class ImageEmbedding(nn.Module):
    """The image embedding of an objective, as features."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective, self.size = objective, objective.config.image_size

    def forward(self, image_BCHW: Tensor) -> Features:
        return {"embedding": self.objective.embed_image(image_BCHW)}


class ZeroShot(Evaluator):
    """`accuracy/zero shot` and `accuracy5/zero shot`: top-1, and top-5 where there are more than five classes.
    The ranks share images and classes."""

    Config = ZeroShotConfig
    needs = EmbedsPairs

    def __init__(self, config: ZeroShotConfig, context: EvalContext):
        super().__init__(config, context)
        self.images = open_images(config, context.cache)
        self.names = class_names(config, self.images)

    def run(self, subject: Subject) -> Result:
        objective = subject.whole
        image_ME = extract_shared(ImageEmbedding(objective), self.images, self.context)["embedding"]
        class_CE = self._embed_classes(objective)
        numbers = {label: number for number, label in enumerate(self.names)}
        mine = [*share(len(image_ME))]
        true_m = torch.tensor([numbers[self.images.labels[i]] for i in mine], dtype=torch.int64)
        hits = sum_over_ranks(torch.tensor([hits_among(image_ME[mine], class_CE, true_m, k) for k in (1, 5)]))
        top1, top5 = (count / len(image_ME) for count in hits)
        metrics = {"accuracy/zero shot": top1}
        if len(self.names) > 5:
            metrics["accuracy5/zero shot"] = top5
        about = {"method": "zero shot", "encoder": self.encoder_name(subject), "test_images": len(image_ME)}
        about |= {"data": without_signatures(self.config.data), "setting": f"{len(self.config.templates)} template(s)"}
        return Result(metrics, [about | metrics])

    def _embed_classes(self, objective: Objective) -> Tensor:
        """Returns fp32 [C, E], of unit length: means over the templates; each rank embeds its share of the classes."""
        names, tokenizer = list(self.names.values()), self.context.tokenizer
        mine = [names[i] for i in share(len(names))] or names[:1]
        texts = [template.replace("{}", name) for name in mine for template in self.config.templates]
        embedded = embed_texts(objective, tokenizer, texts, self.context.micro_batch)
        mean_cE = embedded.unflatten(0, (len(mine), -1)).mean(1)
        return gather_rows(nn.functional.normalize(mean_cE, dim=1), len(names))


def open_images(config: ZeroShotConfig, cache: str | None) -> Source:
    """Returns the images that the options name.

    Raises:
        DataError: they are missing or damaged.
    """
    kind, _, where = config.data.partition(":")
    if kind == "fashion-mnist":
        source = open_fashion_mnist(Path(where or fashion_mnist.INSTALLED), "t10k")
    elif config.data == "openmoji":
        source = open_openmoji(cache)[1]
    else:
        source = open_source(config.data, config.label, cache)
    return source if config.limit is None else source.select(spread(len(source), config.limit))


def class_names(config: ZeroShotConfig, images: Source) -> dict[str, str]:
    """Returns label → name of each candidate.

    Raises:
        RunError: the file of names cannot be used, or lacks a class.
    """
    labels = sorted(set(images.labels))
    if config.names is None:
        return {label: label.replace("_", " ") for label in labels}
    try:
        names = json.loads(Path(config.names).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"names {config.names} cannot be read as JSON: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise RunError(f"names {config.names} must be a JSON object, from each class to its name")
    if missing := [label for label in labels if label not in names]:
        raise RunError(f"names {config.names} has no name for class '{missing[0]}' ({len(missing)} are missing)")
    return names


@torch.inference_mode()
def embed_texts(
    objective: Objective, tokenizer: Tokenizer, texts: list[str], batch: int, language: str = TEXT_LANGUAGE
) -> Tensor:
    """Returns the texts' embeddings, fp32 [len(texts), E] of unit length, on the CPU."""
    length, parts = objective.config.text_length, []
    for i in range(0, len(texts), batch):
        tokens_BT = tokens_of(texts[i : i + batch], tokenizer, length, language)
        parts.append(objective.embed_text(tokens_BT).float().cpu())
    return torch.cat(parts)


def hits_among(image_ME: Tensor, class_CE: Tensor, true_M: Tensor, k: int) -> int:
    """Returns how many images have their class among the k nearest to them; ties count against it."""
    similarity_MC = image_ME @ class_CE.T
    own_M1 = similarity_MC.gather(1, true_M[:, None])
    return int(((similarity_MC >= own_M1).sum(1) <= k).sum())
