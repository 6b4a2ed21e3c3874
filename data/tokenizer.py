"""Captions → token ids: BOS first, EOS last, PAD after. On the `tokenizers` library alone."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from mug.data.errors import DataError

# What the field calls each special token, in the order in which they are tried.
NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "bos": ("[BOS]", "<bos>", "[CLS]", "<s>", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("[EOS]", "<eos>", "[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}


def _read(name_or_path: str | Path) -> tokenizers.Tokenizer:
    path = Path(name_or_path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.exists():
            return tokenizers.Tokenizer.from_file(str(path))
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name_or_path)) and path.suffix != ".json":
            return tokenizers.Tokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer '{name_or_path}' cannot be read: {error}") from error
    raise DataError(f"tokenizer '{path}' does not exist: give a tokenizer.json, its folder or a hub name")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids of its special tokens; `mask` is None where it has none."""

    backend: tokenizers.Tokenizer
    pad: int
    bos: int
    eos: int
    mask: int | None

    @staticmethod
    def load(name_or_path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

        Raises:
            DataError: it cannot be found or read, or lacks a PAD, BOS or EOS token.
        """
        backend = _read(name_or_path)
        backend.no_truncation()
        backend.no_padding()
        ids = {}
        for role, names in NAMES.items():
            found = [backend.token_to_id(name) for name in names]
            ids[role] = next((i for i in found if i is not None), None)
            if ids[role] is None and role != "mask":
                raise DataError(
                    f"tokenizer '{name_or_path}' has no {role.upper()} token: add one of {', '.join(names)}"
                )
        return Tokenizer(backend, **ids)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def _special(self) -> set[int | None]:
        return {self.pad, self.bos, self.eos, self.mask}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self.backend.get_vocab().items())).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self.backend.to_str()

    def encode(self, caption: str, length: int) -> np.ndarray:
        """int64 [length]: BOS, the caption cut to fit, EOS, then PAD. All PAD means: no caption.

        `caption` is clean (`mug.data.captions.clean`), as `choose` returns it.
        """
        tokens = np.full(length, self.pad, dtype=np.int64)
        ids = self.backend.encode(caption, add_special_tokens=False).ids
        # A caption that spells a special token out must not end, or mask, anything.
        ids = [i for i in ids if i not in self._special][: length - 2]
        if ids:
            tokens[: len(ids) + 2] = [self.bos, *ids, self.eos]
        return tokens

    def decode(self, ids) -> str:
        """The text of token ids [T] up to the first EOS, without special tokens."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.backend.decode([i for i in ids if i not in self._special], skip_special_tokens=True).strip()
