"""What a kind of batch is made of, and what each other module of this folder offers.

A kind is a module of this folder, found by its file name. It has

    Config                                      its options, a dataclass
    open_train(config, seed, shape)             its training samples
    open_held_out(config, shape)                its samples to evaluate on, or None where there are none
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from torch import Tensor

from mug.data.bad_samples import Replacement
from mug.data.crops import ViewConfig
from mug.data.errors import DataError
from mug.data.order import SampleOrder
from mug.data.tokenizer import Tokenizer


class Batch(dict[str, Tensor]):
    """The tensors of B samples by name, all of one `kind`: the name of a module of this folder. A copy keeps it."""

    def __init__(self, kind: str, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.kind = kind


@dataclass(frozen=True)
class Shape:
    """What a model asks of its samples.

    image_size: side of the square images, in pixels.
    text_length: tokens of a caption, BOS and EOS among them.
    views: random crops of a sample, `views` in the batch; without any, one crop, `image`.
    """

    image_size: int
    text_length: int | None = None
    views: tuple[ViewConfig, ...] = ()

    def check_one_view(self, what: str) -> None:
        """Raise DataError where several views are wanted of samples that are read in one."""
        if self.views:
            raise DataError(f"{what} are read in one view; only pairs and image_bitext can be read in several")


@runtime_checkable
class Samples(Protocol):
    """Samples by position. Cheap to pickle, for the processes that read them.

    order: which sample stands at a position of training; None where positions number the samples themselves.
    kind: of the batches, unless they have their own, as a mixture's do.
    tokenizer: of the texts, None where there are none.
    class_names: of the labels, empty where there are none.
    """

    @property
    def order(self) -> SampleOrder | None: ...

    @property
    def kind(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int:
        """Returns the number of samples."""

    def identity(self) -> dict[str, str]:
        """Returns what the sample at a saved position depends on, besides the order: `fingerprint`, and others."""

    def files(self) -> dict[str, str]:
        """Returns the texts that a checkpoint keeps, by file name: a tokenizer.json, for one."""

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns the samples at these positions, and which of them stand in for others."""


def kind_names() -> list[str]:
    """Returns the names of all kinds."""
    folder = Path(__file__).parent
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name != "samples")


def find_kind(name: str) -> ModuleType:
    """Returns the module of a kind: see the head of this file.

    Raises:
        DataError: it does not exist.
    """
    if name not in kind_names():
        raise DataError(f"'{name}' is not a kind of data: give one of {', '.join(kind_names())}")
    return importlib.import_module(f"mug.data.kinds.{name}")
