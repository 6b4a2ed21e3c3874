"""What `run/build_shards.py` reads: a row for each kind of source, with how it is read and divided."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mug.data.builders import fashion_mnist, openclipart
from mug.data.builders.cldr import cldr_pairs, read_cldr
from mug.data.builders.debian_descriptions import read_descriptions
from mug.data.builders.digits import digit_pairs
from mug.data.builders.fashion_mnist import fashion_mnist_pairs
from mug.data.builders.flags import flag_pairs, read_flags
from mug.data.builders.gemojione import gemojione_pairs
from mug.data.builders.gimp_help import gimp_help_pairs, read_gimp_help, read_gimp_help_texts
from mug.data.builders.libreoffice_help import read_libreoffice_help
from mug.data.builders.manuals import of_pages
from mug.data.builders.multi30k import multi30k_pairs, multi30k_splits
from mug.data.builders.openclipart import find_openclipart, openclipart_pairs
from mug.data.builders.openmoji import openmoji_pairs
from mug.data.builders.oxygen import oxygen_pairs
from mug.data.builders.papirus import papirus_pairs
from mug.data.builders.public_questions import xgqa_samples, xvnli_samples
from mug.data.builders.raw_pairs import folder_pairs, parquet_pairs
from mug.data.builders.scene_questions import scene_question_samples
from mug.data.builders.shuffled import shuffled_pairs
from mug.data.builders.statements import read_drawings, statement_samples
from mug.data.builders.tatoeba import read_tatoeba
from mug.data.builders.udhr import read_udhr
from mug.data.builders.wesnoth_pictures import wesnoth_picture_pairs
from mug.data.builders.wesnoth_units import wesnoth_unit_pairs
from mug.data.builders.writers import Sample, is_held_out, of_keys
from mug.data.left_out import LeftOut

Pairs = Callable[[Callable[[str], bool]], Iterator[Sample]]  # whether a key or group is wanted → its pairs


class Belongs(Protocol):
    def __call__(self, key: str, split: str, share: float) -> bool:
        """Whether the pair of this key or group goes into this split, of which `share` is held out."""


def belongs(key: str, split: str, share: float) -> bool:
    return is_held_out(key, share) == (split == "held_out")


def belongs_officially(key: str, split: str, share: float) -> bool:
    """Whether the picture of this key is of this split, where the data set has made them; the share is its own."""
    return key.startswith("t10k/") == (split == "held_out")


def belongs_to_evaluation(key: str, split: str, share: float) -> bool:
    """Whether the split is that of evaluation, for which everything is."""
    return split == "held_out"


def belongs_by_its_key(key: str, split: str, share: float) -> bool:
    """Whether the sample of this key, SPLIT/…, is of this split; the share is its builder's."""
    return key.startswith(f"{split}/")


def usual_splits(source: Path | None, share: float) -> list[str]:
    return ["train", "held_out"] if share else ["train"]


@dataclass(frozen=True)
class Source:
    """How one kind of source is read.

    `pairs` takes (folder or file, or None for where Debian puts it; name of the captions; what is left out).
    `splits` takes (folder or file, share held out), and raises DataError where the source has none of those that its
    kind has.
    """

    pairs: Callable[[Any, str | None, LeftOut], Pairs]
    needed: bool = False  # whether a folder or file must be given
    names_captions: bool = False  # whether --caption says which captions to take
    answered: bool = False  # whether each sample's json has an answer as `label`
    belongs: Belongs = belongs
    splits: Callable[[Any, float], list[str]] = usual_splits


SOURCES = {
    "folder": Source(
        lambda source, caption, left_out: partial(folder_pairs, source, caption, left_out),
        needed=True,
        names_captions=True,
    ),
    "parquet": Source(
        lambda source, caption, left_out: partial(parquet_pairs, source, caption), needed=True, names_captions=True
    ),
    "shuffled": Source(lambda source, caption, left_out: partial(shuffled_pairs, str(source)), needed=True),
    "openmoji": Source(lambda source, caption, left_out: openmoji_pairs),
    "digits": Source(lambda source, caption, left_out: digit_pairs),
    "gemojione": Source(lambda source, caption, left_out: partial(gemojione_pairs, source, left_out)),
    "oxygen": Source(lambda source, caption, left_out: partial(oxygen_pairs, source)),
    "papirus": Source(lambda source, caption, left_out: partial(papirus_pairs, source)),
    "wesnoth-pictures": Source(lambda source, caption, left_out: partial(wesnoth_picture_pairs, source, left_out)),
    "wesnoth-units": Source(lambda source, caption, left_out: partial(wesnoth_unit_pairs, source, left_out)),
    "openclipart": Source(
        lambda source, caption, left_out: partial(
            openclipart_pairs, find_openclipart(source or openclipart.INSTALLED), left_out
        )
    ),
    "fashion-mnist": Source(
        lambda source, caption, left_out: partial(fashion_mnist_pairs, source or fashion_mnist.INSTALLED),
        belongs=belongs_officially,
    ),
    "cldr": Source(lambda source, caption, left_out: partial(cldr_pairs, read_cldr(source, left_out)), needed=True),
    "debian-descriptions": Source(
        lambda source, caption, left_out: partial(of_keys, read_descriptions(source, left_out)), needed=True
    ),
    "udhr": Source(
        lambda source, caption, left_out: partial(of_keys, read_udhr(source, left_out)),
        needed=True,
        belongs=belongs_to_evaluation,
    ),
    "tatoeba": Source(
        lambda source, caption, left_out: partial(of_keys, list(read_tatoeba(source, left_out))),
        needed=True,
        belongs=belongs_to_evaluation,
    ),
    "multi30k": Source(
        lambda source, caption, left_out: partial(multi30k_pairs, source, left_out),
        needed=True,
        belongs=belongs_by_its_key,
        splits=lambda source, share: multi30k_splits(source),
    ),
    "libreoffice-help": Source(
        lambda source, caption, left_out: partial(of_pages, read_libreoffice_help(source, left_out)), needed=True
    ),
    "gimp-help": Source(
        lambda source, caption, left_out: partial(gimp_help_pairs, read_gimp_help(source, left_out)), needed=True
    ),
    "gimp-help-texts": Source(
        lambda source, caption, left_out: partial(of_pages, read_gimp_help_texts(source, left_out)), needed=True
    ),
    "flags": Source(lambda source, caption, left_out: partial(flag_pairs, read_flags(source, left_out)), needed=True),
    "statements": Source(
        lambda source, caption, left_out: partial(statement_samples, read_drawings(source, left_out), left_out),
        needed=True,
        answered=True,
    ),
    "scene-questions": Source(
        lambda source, caption, left_out: scene_question_samples, answered=True, belongs=belongs_by_its_key
    ),
    "xvnli": Source(
        lambda source, caption, left_out: partial(xvnli_samples, source, left_out),
        needed=True,
        answered=True,
        belongs=belongs_by_its_key,
    ),
    "xgqa": Source(
        lambda source, caption, left_out: partial(xgqa_samples, source, left_out),
        needed=True,
        answered=True,
        belongs=belongs_by_its_key,
    ),
}
