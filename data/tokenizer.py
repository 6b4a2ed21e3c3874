"""Captions → token ids: BOS first, EOS last, PAD after. Needs only the `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from mug.data.errors import DataError

# Usual names of each special token, in the order in which they are tried.
NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "bos": ("[BOS]", "<bos>", "[CLS]", "<s>", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("[EOS]", "<eos>", "[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>"),
}
NEEDED = ("pad", "bos", "eos")
ROLES = (*NEEDED, "mask")
# The files of transformers that lie next to a tokenizer.json, and what they call the tokens.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
KEYS = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token")}
# The special token of a language: `[pt-BR]`, or `pt_XX` as mBART has them. In capitals, brackets hold a role.
LANGUAGE = re.compile(r"\[([a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*)\]|([a-z]{2})_[A-Z]{2}")


def language_token(language: str) -> str:
    """Returns the token of a language, a code as `en` or `pt-BR`.

    Raises:
        DataError: it is not such a code.
    """
    token = f"[{language}]"
    if not LANGUAGE.fullmatch(token):
        raise DataError(f"'{language}' is not a language code: give codes such as en, zh or pt-BR")
    return token


def _find(name_or_path: str | Path) -> Path:
    """Returns the tokenizer.json of a path, a folder, or a name on the Hugging Face hub; SETTINGS lie in its folder."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name_or_path)) or path.suffix == ".json":
        raise DataError(f"tokenizer '{path}' does not exist: give a tokenizer.json, its folder or a hub name")
    from huggingface_hub import snapshot_download  # what `tokenizers` itself downloads with

    try:
        folder = snapshot_download(str(name_or_path), allow_patterns=["tokenizer.json", *SETTINGS])
    except Exception as error:  # the network has its own kinds of failure
        raise DataError(f"tokenizer '{name_or_path}' cannot be read: {error}") from error
    if not (path := Path(folder) / "tokenizer.json").exists():
        raise DataError(f"tokenizer '{name_or_path}' has no tokenizer.json on the hub: choose one that has")
    return path


def _stated(file: Path) -> dict[str, list[str]]:
    """Returns role → tokens, as the SETTINGS next to a tokenizer.json name them."""
    stated: dict[str, list[str]] = {role: [] for role in NAMES}
    for path in (file.with_name(name) for name in SETTINGS):
        try:
            settings = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"'{path}' cannot be read ({error}): fetch it again or delete it") from error
        settings = settings if isinstance(settings, dict) else {}
        for role in NAMES:
            for token in (settings.get(key) for key in KEYS.get(role, (f"{role}_token",))):
                token = token.get("content") if isinstance(token, dict) else token
                stated[role] += [token] if isinstance(token, str) else []
    return stated


def _kept(backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Returns role → token, as `Tokenizer.load` left them in the post-processor; {} where it did not write it."""
    processor = json.loads(backend.post_processor.__getstate__()) if backend.post_processor else {}
    kept = processor["special_tokens"] if processor.get("type") == "TemplateProcessing" else {}
    return {role: kept[role]["tokens"][0] for role in ROLES if role in kept} if kept.keys() >= {*NEEDED} else {}


def _candidates(role: str, stated: dict[str, list[str]]) -> Iterator[str]:
    """Returns the tokens to try for a role, the likeliest first.

    Many tokenizers state one token for two roles (CLIP and Qwen pad with the end of text, GPT-2 begins with it). PAD
    must mean "no token" and EOS must end a caption, so a token that is another role's by name is passed over.
    """
    others = {name for other, names in NAMES.items() if other != role for name in names} | {*stated["unk"]}
    yield from (token for token in stated[role] if token not in others)
    yield from NAMES[role]


def _special_tokens(backend: tokenizers.Tokenizer, stated: dict[str, list[str]], chosen: dict[str, str]) -> None:
    """Add the missing roles to `chosen`, role → token. Those of NEEDED that the tokenizer lacks are added to it."""
    for role in ROLES:
        if role in chosen:
            continue
        there = (token for token in _candidates(role, stated) if backend.token_to_id(token) is not None)
        token = next((token for token in there if token not in chosen.values()), None)
        if token is None and role in NEEDED:
            token = next(name for name in (*NAMES[role], f"<|mug_{role}|>") if backend.token_to_id(name) is None)
            backend.add_special_tokens([token])
        if token is not None:
            chosen[role] = token


def _language_tokens(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Returns language → id of its special token, in the order of the ids."""
    added = sorted(backend.get_added_tokens_decoder().items())
    found = ((i, LANGUAGE.fullmatch(token.content)) for i, token in added if token.special)
    return {match[1] or match[2]: i for i, match in found if match}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids of its special tokens; `mask` is None where it has none.

    added: the special tokens that it lacked.
    language_tokens: language → id of its token, in the order of the ids; empty where it has none.
    """

    backend: tokenizers.Tokenizer
    pad: int
    bos: int
    eos: int
    mask: int | None
    added: tuple[str, ...] = ()
    language_tokens: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def load(name_or_path: str | Path, special_tokens: Mapping[str, str] | None = None) -> "Tokenizer":
        """Load a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

        Its PAD, BOS, EOS and MASK tokens are those of `special_tokens` (role, in lower case → token), else those that
        SETTINGS next to it name, else those of NAMES. A PAD, BOS or EOS token that it lacks is added at its end. All
        are written into its post-processor, so that `to_json` alone gives the same tokenizer again.

        Raises:
            DataError: it cannot be found or read, or `special_tokens` does not fit it.
        """
        wanted, file = special_tokens or {}, _find(name_or_path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer '{name_or_path}' cannot be read: {error}") from error
        for role, token in wanted.items():
            if role not in ROLES:
                raise DataError(f"data.special_tokens has the unknown role '{role}': give some of {', '.join(ROLES)}")
            if backend.token_to_id(token) is None:
                raise DataError(f"data.special_tokens {role}: tokenizer '{file}' has no token '{token}'")
        backend.no_truncation()
        backend.no_padding()
        known, tokens = backend.get_vocab_size(), _kept(backend) | dict(wanted)
        _special_tokens(backend, _stated(file), tokens)
        ids: dict[str, Any] = {role: backend.token_to_id(token) for role, token in tokens.items()}
        if len(set(ids.values())) < len(ids):
            raise DataError(f"tokenizer '{file}': {', '.join(f'{r} {t}' for r, t in tokens.items())}: all must differ")
        backend.post_processor = TemplateProcessing(
            single="bos $A eos",
            special_tokens=[{"id": r, "ids": [ids[r]], "tokens": [t]} for r, t in tokens.items()],
        )
        added = tuple(token for role, token in tokens.items() if ids[role] >= known)
        languages = _language_tokens(backend)
        needed = {role: ids[role] for role in NEEDED}
        return Tokenizer(backend, **needed, mask=ids.get("mask"), added=added, language_tokens=languages)

    @property
    def vocab_size(self) -> int:
        """Returns the largest id plus one."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def languages(self) -> tuple[str, ...]:
        """Returns the languages that have a token, in the order of their ids."""
        return tuple(self.language_tokens)

    @property
    def language_ids(self) -> tuple[int, ...]:
        """Returns the ids of the languages' tokens."""
        return tuple(self.language_tokens.values())

    @cached_property
    def _special(self) -> set[int | None]:
        return {self.pad, self.bos, self.eos, self.mask, *self.language_ids}

    @cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self.backend.get_vocab().items())).encode()).hexdigest()

    def to_json(self) -> str:
        """Returns the text of a tokenizer.json."""
        return self.backend.to_str()

    def encode(self, caption: str, length: int, language: str | None = None) -> np.ndarray:
        """Returns int64 [length]: BOS, the caption cut to fit, EOS, then PAD. All PAD means: no caption.

        With a language, one of `languages`, its token follows EOS (mBART, arXiv 2001.08210). `caption` is clean
        (`mug.data.captions.clean`), as `choose` returns it.
        """
        end = [self.eos] if language is None else [self.eos, self.language_tokens[language]]
        return self._framed(caption, length, self.bos, end)

    def encode_target(self, text: str, length: int, language: str) -> np.ndarray:
        """Returns int64 [length] for a decoder to write: the language's token, the text cut to fit, EOS, then PAD."""
        return self._framed(text, length, self.language_tokens[language], [self.eos])

    def _framed(self, text: str, length: int, begin: int, end: list[int]) -> np.ndarray:
        tokens = np.full(length, self.pad, dtype=np.int64)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        # A special token's name in a text is plain text: it must not end, mask, or be the language of, anything.
        ids = [i for i in ids if i not in self._special][: length - 1 - len(end)]
        if ids:
            tokens[: len(ids) + 1 + len(end)] = [begin, *ids, *end]
        return tokens

    def decode(self, ids) -> str:
        """Returns the text of token ids [T] up to the first EOS, without special tokens."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.backend.decode([i for i in ids if i not in self._special], skip_special_tokens=True).strip()
