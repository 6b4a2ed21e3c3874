"""Files in a tar whose extension has two parts, or names the caption: `k.caption.txt`, `k.input.jpg`, `k.prompt`.

To webdataset they are fields of the sample `k` with names of their own. As parts of a pair they mean one thing where

- `k` has an image, and text under a usual name of captions: the text is its caption;
- `k` has one image, under a name: it is the image, and the text of the same name, or else the only one, its caption;
- `k` has several images under names: each is a sample, for `k.1` and `k.2` are names with dots in them.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mug.data.captions import TEXT_EXTENSIONS, rank
from mug.data.errors import DataError
from mug.data.index.rows import IMAGE, TEXT
from mug.data.index.tar import Files


@dataclass(frozen=True, eq=False)
class NamedFile:
    """The file `KEY.NAME.jpg`. place: int64 [2], offset and length."""

    path: bytes
    key: bytes
    name: bytes
    kind: int
    place: np.ndarray

    @property
    def rank(self) -> int | None:
        return rank(self.name.decode(errors="replace"))


class NamedFiles:
    """Collects them from the files of a tar.

    choice: which texts there were to choose from for some sample, "" where there was no choice; for messages.
    """

    def __init__(self, extensions: dict[str, int], caption: str | None):
        """`extensions`: last part of an extension → IMAGE, TEXT or JSON; `caption`: the full one, as data.caption."""
        self.extensions = {extension.encode(): kind for extension, kind in extensions.items()}
        self.caption = None if caption is None else caption.lower().encode().lstrip(b".")
        self.files: dict[bytes, list[NamedFile]] = defaultdict(list)  # by key
        self.choice = ""

    def add(self, files: Files, rows: np.ndarray) -> list[bytes]:
        """Take what may be used from the files at `rows`, int64 [N]; returns the paths of the others."""
        others = []
        for row in rows.tolist():
            path = files.names[row].as_py()
            folder, slash, base = path.rpartition(b"/")
            stem, _, extension = base.partition(b".")
            kind, name = self._kind(extension)
            if stem and kind is not None:
                file = NamedFile(path, folder + slash + stem, name, kind, files.places[row])
                self.files[file.key].append(file)
            else:
                others.append(path)
        return others

    def unused(self, pairs: list[tuple[bytes, NamedFile]]) -> Iterator[bytes]:
        """Returns the paths of those that are in none of the pairs, which `resolve` returned."""
        used = {file for _, file in pairs}
        return (file.path for files in self.files.values() for file in files if file not in used)

    def _kind(self, extension: bytes) -> tuple[int | None, bytes]:
        """Returns what a file is by all after the first dot of its name, None for nothing of a pair; and its name."""
        lower = extension.lower()
        name, _, last = extension.rpartition(b".")
        kind = self.extensions.get(last.lower()) if name else None
        if self.caption is not None:
            return (TEXT, name) if lower == self.caption else (None if kind == TEXT else kind, name)
        if lower.decode(errors="replace") in TEXT_EXTENSIONS:
            return TEXT, extension
        return kind, name

    def resolve(self, keys_M: pa.Array, kind_M: np.ndarray) -> list[tuple[bytes, NamedFile]]:
        """Returns key and file of each part of a pair, where M files without such names have these keys and kinds.

        Raises:
            DataError: no file has the extension that `caption` names.
        """
        files = [file for files in self.files.values() for file in files]
        if self.caption is not None and not any(file.kind == TEXT for file in files):
            raise DataError(f"has no files .{self.caption.decode()}, which data.caption names")
        there: dict[bytes, set[int]] = defaultdict(set)
        if self.files:
            for key, kind in zip(keys_M.to_pylist(), kind_M.tolist(), strict=True):
                there[key].add(kind)
        return [pair for key, mine in self.files.items() for pair in self._of_key(key, mine, there[key])]

    def _of_key(self, key: bytes, files: list[NamedFile], plain: set[int]) -> list[tuple[bytes, NamedFile]]:
        images = [file for file in files if file.kind == IMAGE]
        if IMAGE in plain or not images:
            text = None if TEXT in plain else self._caption(files, None)
            return [(key, text)] if text else []
        if len(images) > 1:
            return [(key + b"." + file.name, file) for file in files]
        (image,) = images
        of_image = [file for file in files if file.name == image.name and file.kind not in plain]
        if len(of_image) > 1 or (len(files) == 1 and not plain):
            return [(key + b"." + image.name, file) for file in of_image]
        text = None if TEXT in plain else self._caption(files, image)
        return [(key, file) for file in (image, text) if file]

    def _caption(self, files: list[NamedFile], image: NamedFile | None) -> NamedFile | None:
        """Returns the caption's text: by data.caption, by its name, or, where the image has a name, the only one."""
        texts = [file for file in files if file.kind == TEXT]
        known = texts if self.caption is not None else [file for file in texts if file.rank is not None]
        known = sorted(known, key=lambda file: (file.rank or 0, file.name))
        if len(known) > 1 and not self.choice:
            names = [f"'{file.name.decode(errors='backslashreplace')}'" for file in known]
            self.choice = f"{names[0]}, not {', '.join(names[1:])}"
        if known:
            return known[0]
        return texts[0] if image and len(texts) == 1 else None
