"""Format, size and kind of images from their first bytes, for many images at once and without decoding any."""

from dataclasses import dataclass

import numpy as np

HEAD = 1024  # bytes looked at; a JPEG says its size after its tables, and after EXIF or ICC data where it has them
FORMATS = ("other", "jpeg", "png", "webp", "gif", "bmp", "tiff")
OTHER, JPEG, PNG, WEBP, GIF, BMP, TIFF = range(len(FORMATS))
PROGRESSIVE, CMYK, ALPHA, ANIMATED = 1, 2, 4, 8  # bits of `flags`, set only where the first bytes tell

# Markers that begin a JPEG frame, whose header says the size: SOF0 to SOF15 without DHT, JPG and DAC.
FRAMES = np.isin(np.arange(256), [m for m in range(0xC0, 0xD0) if m not in (0xC4, 0xC8, 0xCC)])
PROGRESSIVE_FRAMES = np.isin(np.arange(256), (0xC2, 0xC6, 0xCA, 0xCE))


@dataclass(frozen=True, eq=False)
class Sniffed:
    """Of N images: width and height int32 [N], in pixels as stored, 0 where the first bytes do not tell; format
    uint8 [N], a place in FORMATS; flags uint16 [N]."""

    width: np.ndarray
    height: np.ndarray
    format: np.ndarray
    flags: np.ndarray

    @staticmethod
    def zeros(n: int) -> "Sniffed":
        return Sniffed(*(np.zeros(n, dtype) for dtype in (np.int32, np.int32, np.uint8, np.uint16)))

    @staticmethod
    def join(parts: list["Sniffed"]) -> "Sniffed":
        """One after the other."""
        columns = ([getattr(part, name) for part in parts] for name in Sniffed.__dataclass_fields__)
        return Sniffed(*(np.concatenate(column) for column in columns)) if parts else Sniffed.zeros(0)

    def take(self, rows: np.ndarray) -> "Sniffed":
        """Those at `rows`, indices or a mask."""
        return Sniffed(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def heads_of(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """uint8 [N, HEAD]: the first bytes of N images that lie in `data` uint8 [M], zeros beyond the end of each."""
    heads = np.zeros((len(start), HEAD), np.uint8)
    whole = (length >= HEAD) & (start + HEAD <= len(data))
    if whole.any():
        heads[whole] = np.lib.stride_tricks.sliding_window_view(data, HEAD)[start[whole]]
    for row in np.flatnonzero(~whole & (length > 0)):
        part = data[start[row] : start[row] + min(length[row], HEAD)]
        heads[row, : len(part)] = part
    return heads


def sniff(heads: np.ndarray) -> Sniffed:
    """What the first bytes of N images say: `heads` uint8 [N, HEAD], zeros beyond the end of an image.

    The content decides, not the name. A TIFF's size can lie anywhere: 0. An image that is damaged here is `other`
    or has size 0: whether it can be decoded is for the decoder to find out.
    """
    found = Sniffed.zeros(len(heads))
    for format, (readers, starts) in _SIGNATURES.items():
        hits = np.logical_or.reduce([_matches(heads, start) for start in starts])
        (rows,) = np.nonzero(hits)
        found.format[rows] = format
        for read in readers if len(rows) else ():
            read(heads[rows], found, rows)
    unknown = (found.width <= 0) | (found.height <= 0)  # cut off, or more than an int32 holds
    found.width[unknown] = found.height[unknown] = 0
    return found


def _matches(heads: np.ndarray, pieces: dict[int, bytes]) -> np.ndarray:
    hits = [(heads[:, at : at + len(p)] == np.frombuffer(p, np.uint8)).all(axis=1) for at, p in pieces.items()]
    return np.logical_and.reduce(hits)


def _number(heads: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """int64 [N] from the bytes at `places`, the most significant first."""
    value = np.zeros(len(heads), np.int64)
    for place in places:
        value = value << 8 | heads[:, place]
    return value


def _jpeg(heads: np.ndarray, found: Sniffed, rows: np.ndarray) -> None:
    """Walk all JPEGs from segment to segment at once until each has come to its frame, its scan or the end."""
    live, at = np.arange(len(heads)), np.full(len(heads), 2)
    while len(live := live[at[live] + 10 <= HEAD]):
        place = at[live]
        mark, marker = heads[live, place], heads[live, place + 1]
        frame = (mark == 0xFF) & FRAMES[marker]
        image, begin, kind = live[frame], place[frame], marker[frame]
        found.height[rows[image]] = heads[image, begin + 5].astype(np.int32) << 8 | heads[image, begin + 6]
        found.width[rows[image]] = heads[image, begin + 7].astype(np.int32) << 8 | heads[image, begin + 8]
        cmyk = np.where(heads[image, begin + 9] == 4, CMYK, 0)
        found.flags[rows[image]] = cmyk | np.where(PROGRESSIVE_FRAMES[kind], PROGRESSIVE, 0)
        fill = (mark == 0xFF) & (marker == 0xFF)  # any number of FF bytes may stand before a marker
        length = heads[live, place + 2].astype(np.int64) << 8 | heads[live, place + 3]
        at[live] = place + np.where(fill, 1, 2 + np.maximum(length, 2))
        live = live[(mark == 0xFF) & ~frame & (marker != 0xDA) & (marker != 0xD9)]


def _png(heads: np.ndarray, found: Sniffed, rows: np.ndarray) -> None:
    found.width[rows] = _number(heads, (16, 17, 18, 19))
    found.height[rows] = _number(heads, (20, 21, 22, 23))
    animated = _matches(heads, {37: b"acTL"})  # where writers put it: right after IHDR
    found.flags[rows] = np.where(np.isin(heads[:, 25], (4, 6)), ALPHA, 0) | np.where(animated, ANIMATED, 0)


def _webp(heads: np.ndarray, found: Sniffed, rows: np.ndarray) -> None:
    """The three kinds of first chunk: lossy, lossless and extended."""
    lossy, lossless, extended = (_matches(heads, {12: b"VP8" + kind}) for kind in (b" ", b"L", b"X"))
    bits = _number(heads, (24, 23, 22, 21))
    kinds = [lossy, lossless, extended]
    widths = [_number(heads, (27, 26)) & 0x3FFF, (bits & 0x3FFF) + 1, _number(heads, (26, 25, 24)) + 1]
    heights = [_number(heads, (29, 28)) & 0x3FFF, (bits >> 14 & 0x3FFF) + 1, _number(heads, (29, 28, 27)) + 1]
    found.width[rows] = np.select(kinds, widths)
    found.height[rows] = np.select(kinds, heights)
    alpha = lossless & (bits >> 28 & 1 == 1) | extended & (heads[:, 20] & 0x10 > 0)
    animated = extended & (heads[:, 20] & 0x02 > 0)
    found.flags[rows] = np.where(alpha, ALPHA, 0) | np.where(animated, ANIMATED, 0)


def _gif(heads: np.ndarray, found: Sniffed, rows: np.ndarray) -> None:
    found.width[rows] = _number(heads, (7, 6))
    found.height[rows] = _number(heads, (9, 8))


def _bmp(heads: np.ndarray, found: Sniffed, rows: np.ndarray) -> None:
    old = _number(heads, (17, 16, 15, 14)) == 12  # the header of OS/2, with 16-bit sizes
    width = _number(heads, (21, 20, 19, 18)).astype(np.int32)
    height = np.abs(_number(heads, (25, 24, 23, 22)).astype(np.int32))  # negative: the top row comes first
    found.width[rows] = np.where(old, _number(heads, (19, 18)), width)
    found.height[rows] = np.where(old, _number(heads, (21, 20)), height)


# format → how to read it, and what its first bytes are: place → bytes, one dict for each way to begin.
_SIGNATURES = {
    JPEG: ([_jpeg], [{0: b"\xff\xd8\xff"}]),
    PNG: ([_png], [{0: b"\x89PNG\r\n\x1a\n"}]),
    WEBP: ([_webp], [{0: b"RIFF", 8: b"WEBP"}]),
    GIF: ([_gif], [{0: b"GIF87a"}, {0: b"GIF89a"}]),
    BMP: ([_bmp], [{0: b"BM", 15: b"\0\0\0"}]),
    TIFF: ([], [{0: b"II*\0"}, {0: b"MM\0*"}, {0: b"II+\0"}, {0: b"MM\0+"}]),
}
