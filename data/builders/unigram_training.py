"""Trains a tokenizer of several languages on their texts."""

import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mug.data.captions import MAX_TEXT
from mug.data.errors import DataError
from mug.data.tokenizer import language_token

ROLES = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]  # in the order of their ids
MIN_VOCABULARY = 1024  # 256 of it are bytes
COVERAGE = 0.9995  # of the letters, by frequency; the others are read as bytes


def train_unigram(texts: Iterable[str], vocabulary: int, languages: tuple[str, ...] = ()) -> Tokenizer:
    """Returns a Unigram tokenizer of at most `vocabulary` tokens, with one token for each language.

    Case and accents are kept, and letters that it has not seen are read as bytes, so that any text can be written
    again. SentencePiece learns the pieces (Kudo, arXiv 1804.10959) with one thread: the same tokens for the same texts
    (the `tokenizers` library's own trainer gives others at each call). All texts are held in memory.

    Raises:
        DataError: `vocabulary` is too small, or the texts hold nothing to learn from.
    """
    added = ["[MASK]", *map(language_token, languages)]
    if vocabulary < MIN_VOCABULARY + len(added):
        raise DataError(f"a vocabulary of {vocabulary} is too small: give {MIN_VOCABULARY + len(added)} or more")
    normalizer = normalizers.NFC()
    model = learn_model(map(normalizer.normalize_str, texts), vocabulary - len(added))
    tokenizer = Tokenizer(models.Unigram(_pieces(model), unk_id=ROLES.index("[UNK]"), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(token, ROLES.index(token)) for token in ("[BOS]", "[EOS]")]
    )
    tokenizer.add_special_tokens([*ROLES, *added])
    return tokenizer


def learn_model(texts: Iterator[str], limit: int) -> bytes:
    """Returns a model of SentencePiece with at most `limit` pieces, those of ROLES first.

    Raises:
        DataError: the texts hold nothing to learn from.
    """
    import sentencepiece

    model = io.BytesIO()
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise DataError("the captions hold no word to learn from")
    ids: dict[str, Any] = {f"{role.strip('[]').lower()}_id": i for i, role in enumerate(ROLES)}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=limit,
            hard_vocab_limit=False,  # few texts may have fewer pieces
            num_threads=1,
            byte_fallback=True,
            character_coverage=COVERAGE,
            normalization_rule_name="identity",
            max_sentence_length=MAX_TEXT,
            minloglevel=2,
            **ids,
        )
    except RuntimeError as error:  # of any kind, with the place in its source code
        raise DataError(f"sentencepiece learned no tokens from the captions: {' '.join(str(error).split())}") from error
    return model.getvalue()


def _pieces(model: bytes) -> list[tuple[str, float]]:
    """Returns the special tokens of ROLES and the pieces of a model, and the log-probability of each."""
    import sentencepiece

    learned = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(learned.id_to_piece(i), learned.get_score(i)) for i in range(len(ROLES), learned.get_piece_size())]
    return [*((role, 0.0) for role in ROLES), *pieces]
