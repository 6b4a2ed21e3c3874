"""How good written captions are, against the true ones.

BLEU is sacrebleu's, in lower case. CIDEr and METEOR are those of the package pycocoevalcap, where it is installed;
METEOR starts Java. COCO's own evaluation also cuts words with a Java program; here sacrebleu's 13a rules cut them, and
punctuation is left out, so figures differ a little from COCO's.
"""

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence

ORDERS = range(1, 5)
OPTIONAL = ("CIDEr", "METEOR")
PACKAGE = "pycocoevalcap"


def score(written: Sequence[str], true: Sequence[Sequence[str]], warn: Callable[[str], None]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 (0..100), CIDEr and METEOR (0..1, CIDEr up to 10) of N captions against one or more true ones.

    `distinct` is the share of different captions among the written: a model that writes one for every image has 1 / N.
    BLEU-4 of captions that went to the wrong image says how much of the figure is only the language.

    Args:
        warn: told once of each figure that is left out, and why.
    """
    figures = {f"BLEU-{order}": bleu(written, true, order) for order in ORDERS}
    figures["BLEU-4 of another image's"] = bleu([*written[1:], *written[:1]], true, 4)
    figures["distinct"] = len(set(written)) / len(written)
    lacking = missing()
    for name in OPTIONAL:
        if name in lacking:
            warn(f"{name} is left out: {lacking[name]}")
        else:
            figures[name] = coco(name, written, true)
    return figures


def bleu(written: Sequence[str], true: Sequence[Sequence[str]], order: int) -> float:
    """Corpus BLEU up to n-grams of `order`, 0..100."""
    from sacrebleu.metrics import BLEU

    streams = list(itertools.zip_longest(*true))  # the i-th caption of each image, None where it has fewer
    return BLEU(max_ngram_order=order, lowercase=True).corpus_score(list(written), streams).score


def missing() -> dict[str, str]:
    """The optional figures that cannot be had here, and why."""
    if importlib.util.find_spec(PACKAGE) is None:
        return dict.fromkeys(OPTIONAL, f"package {PACKAGE} is not installed (pip install -e '.[eval]')")
    return {} if shutil.which("java") else {"METEOR": "it needs Java"}


def coco(name: str, written: Sequence[str], true: Sequence[Sequence[str]]) -> float:
    """CIDEr or METEOR of the whole set."""
    if name == "CIDEr":
        from pycocoevalcap.cider.cider import Cider as Scorer
    else:
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    ours = {i: [words(caption)] for i, caption in enumerate(written)}
    theirs = {i: [words(caption) for caption in captions] for i, captions in enumerate(true)}
    return float(Scorer().compute_score(theirs, ours)[0])


def words(caption: str) -> str:
    """In lower case, words apart, without punctuation."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    parts = Tokenizer13a()(caption.lower()).split()
    return " ".join(part for part in parts if any(character.isalnum() for character in part))
