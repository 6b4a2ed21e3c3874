"""The files in a tar, from its headers alone: nothing is extracted, and no link is followed.

Plain headers of regular files are read many at a time; all others (long names, sizes beyond octal digits, links,
folders) as Python's `tarfile` reads ustar, GNU and PAX archives.
"""

import io
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mug.data.errors import DataError

Read = Callable[[int, int], bytes]  # (offset, length) → that many bytes, or fewer at the end of the file

BLOCK = 512
NEAR = 2 * BLOCK  # a header and the block after it, read together: the records of a short PAX header
PLAIN, PAX = b"0x"  # the types of nearly all headers
TELLING = re.compile(rb" (path|size|GNU\.sparse[^=]*)=")  # records of the next file that are needed
MAX_EXTENSION = 2**20  # bytes
BATCH = 4096  # headers
WIDE = 2**16  # bytes read at a time where bodies are too small for a jump over them to save anything
FOR_ALL = {"path", "size"}  # records of a global PAX header that plain headers need too
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # of names: any bytes there and back


@dataclass(frozen=True, eq=False)
class Files:
    """M regular files in the tar's order. names: binary [M], none empty. places: int64 [M, 2], the offset and
    length of the body in bytes. links: names of the links among them, which have no body."""

    names: pa.Array
    places: np.ndarray
    links: list[bytes]


class _Member(tarfile.TarInfo):
    """A header as tarfile reads it, less one fault."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC:  # GNU keeps times where ustar has the beginning of a long name
            info.name = buf[:100].partition(b"\0")[0].decode(encoding, errors)
        return info

    @property
    def path_bytes(self) -> bytes:
        return self.name.encode(**TEXT)


class _Stream:
    """The file that tarfile reads one member's headers from. cut: whether it has read beyond the end."""

    def __init__(self, take: Read, offset: int):
        self.take, self.offset, self.limit, self.cut = take, offset, offset + MAX_EXTENSION, False

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int) -> None:
        self.offset = offset

    def read(self, length: int) -> bytes:
        if self.offset + length > self.limit:
            raise DataError(f"holds an extended header of more than {MAX_EXTENSION:,} bytes: rewrite it")
        data = self.take(self.offset, length)
        self.offset += len(data)
        self.cut |= len(data) < length
        return data


class _Archive(tarfile.TarFile):
    """Reads the one member it is asked for, and raises where tarfile would take an error for the end.

    offset: where the next header is, None after the end mark. pax_headers: records for all members that follow.
    """

    def __init__(self):
        super().__init__(fileobj=io.BytesIO(), tarinfo=_Member, **TEXT)

    def next(self) -> None:
        """Override the read that the constructor does: return nothing yet."""

    def member(self, take: Read) -> _Member | None:
        """Returns the member at `offset`, which moves to the next one; None for the end mark.

        Raises:
            DataError: its headers are cut short or damaged, or it is a sparse file.
        """
        begin, stream = self.offset, _Stream(take, self.offset)
        self.fileobj = cast(IO[bytes], stream)
        try:
            info = _Member.fromtarfile(self)
        except tarfile.EOFHeaderError:  # pyrefly: ignore[missing-attribute]  # typeshed leaves it out
            return None
        except (tarfile.TarError, ValueError, RecursionError) as error:
            if stream.cut:
                raise DataError("is cut short, having no end mark: fetch or rewrite it") from error
            raise _bad_header(take(begin, BLOCK), begin, error) from error
        if info.size < 0:
            raise _bad_header(take(begin, BLOCK), begin, "negative size")
        if info.issparse():
            name = _printable(info.path_bytes)
            raise DataError(f"holds a sparse file, '{name}': rewrite it without tar's --sparse")
        return info


class _Window:
    """A tar through a window that moves on. `piece`: what it shows, from `start` on."""

    def __init__(self, read: Read, size: int, width: int):
        self.read, self.size, self.minimum, self.width = read, size, width, width
        self.piece, self.start = b"", 0

    def move(self, offset: int, length: int) -> None:
        """Move the window to at least `length` bytes from `offset` on, fewer only at the end of the tar."""
        skipped = offset - (self.start + len(self.piece))
        self.width = max(self.minimum, min(2 * self.width, WIDE)) if skipped < self.minimum else self.minimum
        self.start, width = offset, max(self.width, length)
        self.piece = self.read(offset, width)
        if len(self.piece) < width and len(self.piece) < self.size - offset:
            raise DataError("became shorter while it was read: rerun when it is complete")

    def take(self, offset: int, length: int) -> bytes:
        """Returns those bytes, fewer only at the end of the tar."""
        if not self.start <= offset <= min(offset + length, self.size) <= self.start + len(self.piece):
            self.move(offset, length)
        return self.piece[offset - self.start : offset - self.start + length]


class _Headers:
    """Headers that follow each other: the plain ones in flat arrays, so that numpy can do most of the work.

    blocks, offset, length: of each plain header its bytes, where it is in the tar, and the size it states. pax: places
    of those that are PAX headers. members: all others.
    """

    def __init__(self, window: _Window):
        self.window = window
        self.blocks: list[bytes] = []
        self.offset, self.length = array("q"), array("q")
        self.pax: list[int] = []
        self.members: list[_Member] = []

    def full(self) -> bool:
        return len(self.blocks) + len(self.members) >= BATCH

    def last_name(self) -> bytes:
        if self.members and (not self.blocks or self.members[-1].offset > self.offset[-1]):
            return self.members[-1].path_bytes
        return self.blocks[-1][:100].partition(b"\0")[0]

    def add_plain(self, offset: int) -> int:
        """Take the headers from `offset` on that are those of regular files, or of PAX records without what is
        needed, such as a modification time.

        Returns where the first header is that needs more care, or is beyond a full batch.
        """
        window, piece, start = self.window, self.window.piece, self.window.start
        last = len(piece) - NEAR
        add_block, add_offset, add_length = self.blocks.append, self.offset.append, self.length.append
        while True:
            at = offset - start
            if at > last:
                if self.full() or offset + NEAR > window.size:
                    return offset
                window.move(offset, NEAR)
                piece, start, at = window.piece, offset, 0
                last = len(piece) - NEAR
            block = piece[at : at + BLOCK]
            try:
                length = int(block[124:136].rstrip(b"\0"), 8)
            except ValueError:
                return offset
            kind = block[156]
            if length < 0 or block[345] or (kind != PLAIN and kind != PAX):  # at 345 a long name continues
                return offset
            if kind == PAX:
                if length > BLOCK or TELLING.search(piece, at + BLOCK, at + BLOCK + length):
                    return offset
                self.pax.append(len(self.blocks))
            add_block(block)
            add_offset(offset)
            add_length(length)
            offset += (length + 2 * BLOCK - 1) & -BLOCK

    def fill(self, archive: _Archive) -> bool:
        """Add headers up to a full batch or to the end mark; returns whether that is where it ended.

        Raises:
            DataError: the tar is cut short, damaged or holds a sparse file.
        """
        while not self.full():
            begin = archive.offset
            if not FOR_ALL & archive.pax_headers.keys():
                archive.offset = self.add_plain(begin)
            if archive.offset == begin:
                member = archive.member(self.window.take)
                if member is None:
                    _check_end(self.window.read, begin, self.window.size)
                    return True
                self.members.append(member)
            if archive.offset > self.window.size:
                raise DataError(f"is cut short inside '{_printable(self.last_name())}': fetch or rewrite it")
        return False

    def check(self) -> np.ndarray:
        """Compare each plain header with its checksum: the sum of its bytes, those of the checksum taken as spaces.

        Returns their bytes, uint8 [M, 512].

        Raises:
            DataError: one does not agree.
        """
        headers = np.frombuffer(bytearray().join(self.blocks), np.uint8).reshape(-1, BLOCK)
        stated = (headers[:, 148:154] - np.uint8(ord("0"))) @ (8 ** np.arange(5, -1, -1))  # as nearly all write it
        headers[:, 148:156] = ord(" ")
        for i in np.flatnonzero(stated != headers.sum(axis=1, dtype=np.uint32)).tolist():
            try:
                _Member.frombuf(self.blocks[i], **TEXT)
            except tarfile.HeaderError as error:
                raise _bad_header(self.blocks[i], self.offset[i], error) from error
        return headers

    def files(self) -> Files:
        """Returns the regular files among them.

        Raises:
            DataError: a header does not agree with its checksum.
        """
        others = [info for info in self.members if info.isreg()]
        other_names = pa.array([info.path_bytes for info in others], pa.binary())
        names = pa.concat_arrays([_first_field(self.check()[:, :100]), other_names])
        offset = np.concatenate([np.array(self.offset) + BLOCK, [info.offset_data for info in others]])
        length = np.concatenate([np.array(self.length), [info.size for info in others]])
        keep = pc.binary_length(names).to_numpy() > 0
        keep[self.pax] = False
        order = np.argsort(offset)
        order = order[keep[order]]
        links = [info.path_bytes for info in self.members if info.issym() or info.islnk()]
        return Files(names.take(pa.array(order)), np.stack([offset, length], axis=1)[order].astype(np.int64), links)


def _first_field(field: np.ndarray) -> pa.Array:
    """Returns binary [M] from uint8 [M, 100], each up to its first 0."""
    zero = field == 0
    lengths = np.where(zero.any(axis=1), zero.argmax(axis=1), field.shape[1])
    field = field[:, : lengths.max(initial=0)]
    inside = np.arange(field.shape[1]) < lengths[:, None]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(field), [None, pa.py_buffer(ends), pa.py_buffer(field[inside])])


def scan(read: Read, size: int, window: int) -> Iterator[Files]:
    """Yields the regular files of a tar of `size` bytes, in batches; bytes are read `window` at a time.

    Raises:
        DataError: the tar is cut short, damaged or holds a sparse file; the message lacks the tar's name.
    """
    archive, seen, whole = _Archive(), _Window(read, size, window), False
    while not whole:
        headers = _Headers(seen)
        try:
            whole = headers.fill(archive)
        except DataError:
            headers.check()  # a damaged header before may be why
            raise
        yield headers.files()


def _bad_header(header: bytes, offset: int, error: object) -> DataError:
    if offset or header[257:262] == b"ustar":
        return DataError(f"is damaged: the header at byte {offset:,} cannot be read ({error}): fetch it again")
    if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" or header[:3] == b"BZh" or header[1:5] == b"7zXZ":
        return DataError("is compressed: unpack it to a plain .tar, in which samples have offsets")
    return DataError("is not a tar, Arrow or Parquet file: give other shards, or fetch it again")


def is_header_of(header: bytes, key: str, length: int) -> bool:
    """Whether a header can be that of a file `KEY.*` of `length` bytes, as far as a header alone shows.

    False where key or size stand in an extended header before it, and the name here is not its beginning.
    """
    start = f"{key}."
    if header.startswith(start.encode()) and header[124:136] == b"%011o\0" % length and header[156] == PLAIN:
        return True  # as nearly all are
    if not is_header(header):
        return False
    info = _Member.frombuf(header, **TEXT)
    name = info.path_bytes.decode(errors="backslashreplace")
    cut = header[99:100] != b"\0" and len(name) == 100  # the field holds no more of a long name
    return info.size == length and (name.startswith(start) or (cut and start.startswith(name)))


def is_header(header: bytes) -> bool:
    """Whether 512 bytes are the header of a regular file."""
    try:
        return _Member.frombuf(header, **TEXT).isreg()
    except tarfile.HeaderError:
        return False


def _check_end(read: Read, offset: int, size: int) -> None:
    """Only padding may follow the end mark: readers stop there, and would lose what was joined on."""
    while offset < size:
        data = read(offset, 2**20)
        if not data or data.strip(b"\0"):
            raise DataError("continues after its end mark, as tars joined by cat do: join them by tar -A")
        offset += len(data)


def _printable(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
