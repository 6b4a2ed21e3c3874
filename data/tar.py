"""The files in a tar, from its headers alone: nothing is extracted, and no link is followed.

Reads ustar, GNU and PAX archives (POSIX.1-2017, "pax", and the GNU tar manual, "Basic Tar Format").
"""

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mug.data.errors import DataError
from mug.data.sniff import HEAD, heads_of

Read = Callable[[int, int], bytes]  # (offset, length) → that many bytes, or fewer at the end of the file

BLOCK = 512
ZEROS = bytes(BLOCK)
NEAR = BLOCK + HEAD  # of a header and the start of its body, read together
FILES = b"07\0"  # types of a regular file
BODILESS = b"123456"  # links, devices, folders, pipes: a size in their header counts no bytes that follow
PLAIN, PAX = b"0x"  # the types of nearly all headers
TELLING = re.compile(rb" (path|size|GNU\.sparse[^=]*)=")  # records of the next file that we need
SPARSE = b"S"
EXTENSIONS = b"xXgLK"  # headers that say something of the next one, in their body
MAX_EXTENSION = 2**20  # bytes
BATCH, BATCH_BYTES = 4096, 2**25  # headers, and bytes read with them
WIDE = 2**16  # bytes read at a time where bodies are too small for a jump over them to save anything


@dataclass(frozen=True, eq=False)
class Files:
    """M regular files in the tar's order. names: binary [M], none empty. places: int64 [M, 2], the offset and
    length of the body in bytes."""

    names: pa.Array
    places: np.ndarray
    _data: np.ndarray  # what was read of the tar
    _at_M: np.ndarray  # where in it the headers are

    def heads(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [N, HEAD]: the first bytes of the bodies at `rows`, a mask; zeros beyond the end of each."""
        return heads_of(self._data, self._at_M[rows] + BLOCK, self.places[rows, 1])


class _Headers:
    """M headers and what was read with them: kept as flat arrays, so that numpy can do most of the work.

    offset, length: where each header is in the tar, and the size it states. names: of those whose name may not be in
    the header's first field, by place. others: places of those that are not regular files. pieces: what was read, and
    for each where in the tar it begins and how many headers came before.
    """

    def __init__(self, read: Read, size: int, window: int):
        self.read, self.size, self.window = read, size, window
        self.width = window  # of the next read
        self.offset, self.length = array("q"), array("q")
        self.names: dict[int, bytes] = {}
        self.others: list[int] = []
        self.pieces: list[bytes] = []
        self.bytes = 0  # in them
        self.starts, self.firsts = array("q"), array("q")

    def full(self) -> bool:
        return len(self.offset) >= BATCH or self.bytes >= BATCH_BYTES

    def _read_piece(self, offset: int) -> bytes:
        skipped = offset - (self.starts[-1] + len(self.pieces[-1]) if self.pieces else 0)
        self.width = max(self.window, min(2 * self.width, WIDE)) if skipped < self.window else self.window
        piece = self.read(offset, self.width)
        if len(piece) < self.width and len(piece) < self.size - offset:
            raise DataError("became shorter while it was read: start again when it is whole")
        self.bytes += len(piece)
        self.pieces.append(piece)
        self.starts.append(offset)
        self.firsts.append(len(self.offset))
        return piece

    def header(self, offset: int) -> bytes:
        """The block at `offset`, read with the start of its body; shorter at the end of the tar."""
        end = self.starts[-1] + len(self.pieces[-1]) if self.pieces else 0
        if offset + NEAR > end and (end < self.size or not self.pieces):
            self._read_piece(offset)
        at = offset - self.starts[-1]
        return self.pieces[-1][at : at + BLOCK]

    def last_name(self) -> bytes:
        return self.names.get(len(self.offset) - 1) or _name(self.read(self.offset[-1], BLOCK))

    def add(self, offset: int, length: int, name: bytes, is_file: bool) -> None:
        self.names[len(self.offset)] = name
        if not is_file:
            self.others.append(len(self.offset))
        self.offset.append(offset)
        self.length.append(length)

    def add_plain(self, offset: int) -> int:
        """Take the headers from `offset` on that are those of regular files, or of PAX records that say nothing we
        need, such as a time of change.

        Returns where the first header is that asks for more care, or is beyond a full batch.
        """
        piece, start, last = b"", offset, -1
        add_offset, add_length = self.offset.append, self.length.append
        while True:
            at = offset - start
            if at > last:
                if self.full() or offset + NEAR > self.size:
                    return offset
                piece, start, at = self._read_piece(offset), offset, 0
                last = len(piece) - NEAR
            try:
                length = int(piece[at + 124 : at + 136].rstrip(b"\0"), 8)
            except ValueError:
                return offset
            kind = piece[at + 156]
            if length < 0 or piece[at + 345] or (kind != PLAIN and kind != PAX):  # at 345 a long name goes on
                return offset
            if kind == PAX:
                if length > HEAD or TELLING.search(piece, at + BLOCK, at + BLOCK + length):
                    return offset
                self.others.append(len(self.offset))
            add_offset(offset)
            add_length(length)
            offset += (length + 2 * BLOCK - 1) & -BLOCK

    def check(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare each header with its checksum: the sum of its bytes, those of the checksum taken as spaces.

        Returns what was read, uint8; where in it each header is, int64 [M]; the headers, uint8 [M, 512].

        Raises:
            DataError: one does not agree.
        """
        data = np.frombuffer(b"".join(self.pieces), np.uint8)
        sizes = np.fromiter(map(len, self.pieces), np.int64)
        counts = np.diff(self.firsts, append=len(self.offset))
        at_M = np.array(self.offset) - np.repeat(np.array(self.starts) - (np.cumsum(sizes) - sizes), counts)
        headers = (
            np.lib.stride_tricks.sliding_window_view(data, BLOCK)[at_M] if len(at_M) else np.empty((0, BLOCK), "u1")
        )
        stated = (headers[:, 148:154] - np.uint8(ord("0"))) @ (8 ** np.arange(5, -1, -1))  # as nearly all write it
        headers[:, 148:156] = ord(" ")
        for i in np.flatnonzero(stated != headers.sum(axis=1, dtype=np.uint32)).tolist():
            header = data[at_M[i] : at_M[i] + BLOCK].tobytes()
            if _number(header[148:156]) not in _sums(header):
                raise _bad_header(header, self.offset[i])
        return data, at_M, headers

    def files(self) -> Files:
        """The regular files among them.

        Raises:
            DataError: a header does not agree with its checksum.
        """
        data, at_M, headers = self.check()
        names = _first_field(headers[:, :100])
        if self.names:
            elsewhere = np.isin(np.arange(len(at_M)), list(self.names))
            names = pc.replace_with_mask(names, elsewhere, pa.array(list(self.names.values()), pa.binary()))
        is_file = pc.binary_length(names).to_numpy() > 0
        is_file[self.others] = False
        places = np.stack([np.array(self.offset) + BLOCK, np.array(self.length)], axis=1)
        return Files(names.filter(pa.array(is_file)), places[is_file], data, at_M[is_file])


def _first_field(field: np.ndarray) -> pa.Array:
    """binary [M] from uint8 [M, 100], each up to its first 0."""
    zero = field == 0
    lengths = np.where(zero.any(axis=1), zero.argmax(axis=1), field.shape[1])
    field = field[:, : lengths.max(initial=0)]
    inside = np.arange(field.shape[1]) < lengths[:, None]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(field), [None, pa.py_buffer(ends), pa.py_buffer(field[inside])])


def scan(read: Read, size: int, window: int) -> Iterator[Files]:
    """The regular files of a tar of `size` bytes, in batches; bytes are asked for `window` at a time.

    Raises:
        DataError: the tar is cut short, damaged or holds a sparse file; the message lacks the tar's name.
    """
    walk = _Walk(size)
    while walk.offset is not None:
        headers = _Headers(read, size, window)
        try:
            walk.fill(headers)
        except DataError:
            headers.check()  # a damaged header before may be why
            raise
        yield headers.files()


class _Walk:
    """Goes from header to header. offset: where the next one is, None after the end mark.

    shared: path and size that extension headers give for all that follow. overrides: those, and what they give for
    the next file.
    """

    def __init__(self, size: int):
        self.size = size
        self.offset: int | None = 0
        self.shared: dict[bytes, bytes | int] = {}
        self.overrides: dict[bytes, bytes | int] = {}

    def fill(self, headers: _Headers) -> None:
        """Add headers up to a full batch or the end; an extension header and its file stay together."""
        while self.offset is not None and (self.overrides != self.shared or not headers.full()):
            beyond = self.offset if self.overrides else headers.add_plain(self.offset)
            if beyond > self.offset:
                self.offset = beyond
            else:
                self._step(headers)

    def _step(self, headers: _Headers) -> None:
        """Take one header of any kind."""
        if self.offset > self.size:
            raise DataError(f"is cut short inside '{_shown(headers.last_name())}': fetch or write it anew")
        header = headers.header(self.offset)
        if header == ZEROS:
            self.offset = _check_end(headers.read, self.offset, self.size)
            return
        if len(header) < BLOCK:
            raise DataError("is cut short, having no end mark: fetch or write it anew")
        kind, name, body = header[156], self.overrides.get(b"path") or _name(header), self.offset + BLOCK
        length = _number(header[124:136])
        if kind not in EXTENSIONS:
            length = self.overrides.get(b"size", length)
        headers.add(self.offset, min(length, self.size), name, kind in FILES)
        if kind in SPARSE:
            raise _sparse(name)
        if length < 0:
            raise DataError(f"is damaged: the header at byte {self.offset:,} holds no valid size: fetch it anew")
        self.offset = body + (0 if kind in BODILESS else -(-length // BLOCK) * BLOCK)
        if kind not in EXTENSIONS:
            self.overrides = dict(self.shared)
        elif self.offset <= self.size:
            said = _extension(kind, headers.read(body, min(length, MAX_EXTENSION + 1)))
            if kind in b"g":
                self.shared |= said
            self.overrides |= said


def _sums(header: bytes) -> tuple[int, int]:
    """The checksum of a header, and as some old tars wrote it, of signed bytes."""
    blank = np.frombuffer(header[:148] + b" " * 8 + header[156:], np.uint8)
    return int(blank.sum(dtype=np.int64)), int(blank.view(np.int8).sum(dtype=np.int64))


def _bad_header(header: bytes, offset: int) -> DataError:
    if offset:
        return DataError(f"is damaged: the header at byte {offset:,} does not agree with its checksum: fetch it anew")
    if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" or header[:3] == b"BZh" or header[1:5] == b"7zXZ":
        return DataError("is compressed: unpack it to a plain .tar, in which samples have offsets")
    return DataError("is no tar, Arrow or Parquet file: name other shards, or fetch it anew")


def _number(digits: bytes) -> int:
    """A header's number: octal, or base 256 where the first bit is set; below 0 where it is neither."""
    if digits[0] & 0x80:
        return -1 if digits[0] & 0x40 else int.from_bytes(digits, "big") & ~(0x80 << 8 * len(digits) - 8)
    try:
        return int(digits.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU tars keep other things in the place of the prefix
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _extension(kind: int, body: bytes) -> dict:
    """What an extension header says: `path` bytes, `size` int."""
    if kind in b"LK":  # GNU: a long name, or a long link target, which is nothing to us
        return {b"path": body.partition(b"\0")[0]} if kind in b"L" else {}
    if len(body) > MAX_EXTENSION:
        raise DataError(f"holds an extended header of more than {MAX_EXTENSION:,} bytes: write it anew")
    records = _pax_records(body)
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        name = records.get(b"GNU.sparse.name") or records.get(b"path") or b"?"
        raise _sparse(name)
    said = {b"path": records[b"path"]} if b"path" in records else {}
    if b"size" in records:
        if not records[b"size"].isdigit():
            raise DataError("is damaged: an extended header gives no valid size: fetch it anew")
        said[b"size"] = int(records[b"size"])
    return said


def _sparse(name: bytes) -> DataError:
    return DataError(f"holds a sparse file, '{_shown(name)}': write it anew without tar's --sparse")


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """keyword → value of the records `LENGTH KEYWORD=VALUE\\n`, where LENGTH counts the whole record."""
    records, at = {}, 0
    while at < len(body) and body[at]:
        digits = body[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = body[at + len(digits) + 1 : at + length].partition(b"=")
        if not equals or value[-1:] != b"\n":
            raise DataError("is damaged: an extended header cannot be read: fetch it anew")
        records[keyword] = value[:-1]
        at += length
    return records


def _check_end(read: Read, offset: int, size: int) -> None:
    """Only padding may follow the end mark: readers stop there, and would lose what was joined on."""
    while offset < size:
        data = read(offset, 2**20)
        if not data or data.strip(b"\0"):
            raise DataError("goes on after its end mark, as tars do that were joined by cat: join them by tar -A")
        offset += len(data)


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
