"""JPEGs that libjpeg warns of although their pixels are intact: phones, scanners and editors write them.

simplejpeg's strict mode ends at libjpeg's first warning, whatever it is about. So the harmless causes are removed from
a copy, which is decoded strictly again: what is warned of then is damage. Segments follow ITU-T T.81, annex B.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg

SOF0, SOF1, EOI, SOS, APP0, APP14 = 0xC0, 0xC1, 0xD9, 0xDA, 0xE0, 0xEE
BARE = (0x01, 0xD8, *range(0xD0, 0xD8))  # markers without a length
SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
PADDING = re.compile(rb"(?<!\xff)\x00+(?=\xff[\xd0-\xd7]|\Z)")  # not the zero of FF 00, which is data


def decode_jpeg(data: bytes, **options: Any) -> np.ndarray:
    """Returns the pixels of a grey or RGB JPEG, uint8 [H, W, 3]; `options` are simplejpeg's.

    Raises:
        ValueError: it is cut or damaged, so that some of its pixels would be made up.
    """
    try:
        return simplejpeg.decode_jpeg(data, strict=True, **options)
    except ValueError as error:
        if str(error).startswith("Premature end"):
            raise
        for trim in (bytes, _without_zeros, _without_common_end):
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(_tidied(data, trim), strict=True, **options)
        raise error


@dataclass(frozen=True)
class _Segment:
    """A marker with what belongs to it; of a scan, `codes` are its compressed data."""

    marker: int
    bytes: bytes
    codes: bytes = b""


def _segments(data: bytes) -> Iterator[_Segment]:
    """Returns the segments, without stray bytes between them; the last holds all from the end mark on."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF):
            at += 2 - (marker == 0xFF)
        elif marker == EOI:
            yield _Segment(EOI, data[at:])
            return
        elif marker in BARE:
            yield _Segment(marker, data[at : at + 2])
            at += 2
        else:
            body = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
            found = SCAN_END.search(data, body) if marker == SOS else None
            end = found.start() if found else len(data) if marker == SOS else body
            yield _Segment(marker, data[at:body], data[body:end])
            at = end


def _tidied(data: bytes, trim: Callable[[bytes], bytes]) -> bytes:
    """Returns the JPEG without what libjpeg warns of though it changes no pixel; `trim` is applied to the codes."""
    tidy, sequential = bytearray(data[:2]), False
    for segment in _segments(data):
        fixed = bytearray(segment.bytes)
        sequential |= segment.marker in (SOF0, SOF1)
        if segment.marker == APP0 and fixed[4:9] == b"JFIF\0" and len(fixed) > 9:
            fixed[9] = 1  # the version, of which there is no other
        if segment.marker == APP14 and fixed[4:9] == b"Adobe" and len(fixed) > 15 and fixed[15] > 2:
            fixed[15] = 1  # YCbCr, as libjpeg takes an unknown transform
        if segment.marker == SOS and sequential:
            fixed[-3:] = b"\0\x3f\0"  # all coefficients at once: a sequential scan has no other
        tidy += fixed + trim(segment.codes)
    return bytes(tidy)


def _without_zeros(codes: bytes) -> bytes:
    """Returns the codes of a scan without the zeros that fill up the end of each restart interval."""
    return PADDING.sub(b"", codes)


def _without_common_end(codes: bytes) -> bytes:
    """Returns the codes of a scan without the bytes that end all its restart intervals, as some scanners write."""
    *intervals, last = RESTART.split(codes)
    from_end = zip(*(interval[::-1] for interval in intervals), strict=False)
    common = itertools.takewhile(lambda column: len(set(column)) == 1, from_end)
    stray = sum(1 for _ in common) if len(intervals) > 1 else 0
    ends = [interval[: len(interval) - stray] for interval in intervals]
    return b"".join(end + marker for end, marker in zip(ends, RESTART.findall(codes), strict=True)) + last
