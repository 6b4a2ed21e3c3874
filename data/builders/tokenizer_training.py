"""Trains a tokenizer on captions."""

import string
from collections import Counter
from collections.abc import Iterable
from itertools import chain, repeat

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mug.data.errors import DataError

SPECIAL_TOKENS = ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]"]
MIN_VOCABULARY = 512  # a quarter of it holds the basic letters
MAX_WORD = 100  # characters; WordPiece reads a longer word as [UNK]
BASIC_LETTERS = string.ascii_lowercase + string.digits + string.punctuation


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """Returns a lower-case WordPiece tokenizer of at most `vocabulary` tokens, the same for the same captions.

    Captions are read once and not kept: memory goes by the number of distinct words. Letters take at most a quarter
    of the vocabulary, the most frequent ones; words with other letters teach nothing.

    The library's own WordPiece trainer walks a randomly keyed hash map and gives another vocabulary at each
    call. Its BPE trainer does not: it learns the pieces, with "▁" marking those that begin a word.

    Raises:
        DataError: `vocabulary` is too small, or the captions hold no word.
    """
    if vocabulary < MIN_VOCABULARY:
        raise DataError(f"a vocabulary of {vocabulary} is too small: give {MIN_VOCABULARY} or more")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    split = ((w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(c))) for c in captions)
    words = Counter(word for word in chain.from_iterable(split) if len(word) <= MAX_WORD)
    if not words:
        raise DataError("the captions hold no word to learn from")
    letters = _letters(words, limit=vocabulary // 4)
    known = set(letters)
    inner = ["##" + letter for letter in letters if letter.isalnum()]
    pieces = _learn_pieces({w: n for w, n in words.items() if known.issuperset(w)}, vocabulary)
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *letters, *inner, *pieces]))[:vocabulary]

    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(t, tokens.index(t)) for t in ("[BOS]", "[EOS]")]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _letters(words: Counter[str], limit: int) -> list[str]:
    """Returns the basic letters and the most frequent others, `limit` in all, by code point."""
    counts = Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    others = sorted(counts.keys() - set(BASIC_LETTERS), key=lambda letter: (-counts[letter], letter))
    return sorted([*BASIC_LETTERS, *others[: limit - len(BASIC_LETTERS)]])


def _learn_pieces(words: dict[str, int], limit: int) -> list[str]:
    """Word pieces as WordPiece writes them, `##` before those that continue a word; the earlier learnt come first."""
    bpe = Tokenizer(models.BPE())
    corpus = chain.from_iterable(repeat("▁" + word, count) for word, count in words.items())
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=limit, show_progress=False))
    ids = bpe.get_vocab()
    learnt = sorted(ids, key=ids.__getitem__)
    pieces = (piece[1:] if piece.startswith("▁") else "##" + piece for piece in learnt)
    return [piece for piece in pieces if piece]
