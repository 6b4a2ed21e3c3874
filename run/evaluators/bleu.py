"""BLEU by sacrebleu, with its tokenizer of each language, and what bootstrap needs of it."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from mug.run.evaluators.intervals import bootstrap

# Languages whose words no spaces divide, by sacrebleu's tokenizers that need no further package; the others' is 13a.
TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}
DEFAULT = "13a"

Texts = Sequence[Sequence[str]]  # the true ones of each text that was written


def tokenizer_of(language: str) -> str:
    """Returns the name of sacrebleu's tokenizer for a language, a code as `en` or `zh-Hant`."""
    return TOKENIZERS.get(language.partition("-")[0], DEFAULT)


def bleu(
    written: Sequence[str], true: Texts, order: int = 4, tokenizer: str = DEFAULT, lowercase: bool = True
) -> float:
    """Returns corpus BLEU up to n-grams of `order`, 0..100."""
    return _metric(order, tokenizer, lowercase).corpus_score(list(written), _streams(true)).score


def signature(true: Texts, tokenizer: str) -> str:
    """Returns sacrebleu's signature of BLEU-4 in the texts' own case against these true texts."""
    metric = _metric(4, tokenizer, lowercase=False)
    metric.corpus_score([some[0] for some in true], _streams(true))
    return str(metric.get_signature())


def bootstrapped(systems: Sequence[Sequence[str]], true: Texts, tokenizer: str) -> list[np.ndarray]:
    """Returns of each system BLEU-4 on the same resamples of the texts, float64 [R]: so differences are paired."""
    metric = _metric(4, tokenizer, lowercase=False)
    statistics = [[_statistics(metric, text, some) for text, some in zip(one, true, strict=True)] for one in systems]
    sums = np.split(bootstrap(np.concatenate(statistics, axis=1)), len(systems), axis=1)
    return [np.array([_from_sums(metric, row) for row in sums_RS]) for sums_RS in sums]


def split(text: str, tokenizer: str) -> list[str]:
    """Returns the words of a text in lower case, and its punctuation."""
    return _metric(4, tokenizer, lowercase=True).tokenizer(text.lower()).split()


def _metric(order: int, tokenizer: str, lowercase: bool) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=order, lowercase=lowercase, tokenize=tokenizer)


def _streams(true: Texts) -> list[tuple[str | None, ...]]:
    """Returns the i-th true text of each, None where it has fewer."""
    return list(zip_longest(*true))


def _statistics(metric: Any, written: str, true: Sequence[str]) -> list[int]:
    """Returns lengths, and numbers of n-grams that are right and of all, by order: BLEU is of their sums."""
    found = metric.corpus_score([written], [[one] for one in true])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _from_sums(metric: Any, sums: np.ndarray) -> float:
    written, true, *rest = sums.astype(int).tolist()
    counts, totals = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return metric.compute_bleu(counts, totals, written, true, smooth_method=metric.smooth_method).score
