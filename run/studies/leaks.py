"""Does a pool hold the pictures of a judge? By their bytes, and by a hash that survives scaling and recompression."""

import hashlib
import logging
from collections.abc import Iterator

import numpy as np

from mug.data.config import DataConfig
from mug.data.crops import CentralSquare
from mug.data.decode import decode_crop
from mug.data.errors import BadSample
from mug.data.reader import Reader
from mug.run.studies.plan import Plan

SIDE = 8
BLANK = bytes(SIDE)

log = logging.getLogger("mug")


def perceptual_hash(image: bytes) -> bytes:
    """Returns 64 bits: whether each of 8 x 8 grey cells of the central square is brighter than the one to its left."""
    grey_HW = decode_crop(image, 8 * (SIDE + 1), CentralSquare()).astype(np.float64).mean(0)
    cells = grey_HW.reshape(SIDE + 1, 8, SIDE + 1, 8).mean((1, 3))
    return np.packbits(np.diff(cells[:SIDE], axis=1) > 0.5).tobytes()


def fingerprints(shards: str) -> Iterator[tuple[str, bytes]]:
    """Yields the SHA-256 and the perceptual hash of each image; then warns of those that cannot be used."""
    reader, bad = Reader.open(shards, DataConfig()), []
    for place in reader.spread(len(reader.index)):
        try:
            image = reader.read(*place)[0]
            yield hashlib.sha256(image).hexdigest(), perceptual_hash(image)
        except BadSample as error:
            bad.append(f"{reader.index.name(*place)}: {error}")
    if bad:
        log.warning(f"{len(bad):,} pictures cannot be used and are not looked for; the first: {bad[0]}")


def leaks(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Returns a table: how many of each judge's test pictures the first pool holds.

    Pictures without a mark, such as a white square, have the same hash, BLANK, and are not counted by it.
    """
    first = next(iter(plan.study.pools))
    pool = [*fingerprints(plan.pool(first))]
    digests, hashes = {digest for digest, _ in pool}, {one for _, one in pool} - {BLANK}
    rows = []
    for name, judge in plan.study.judges.items():
        test = [*fingerprints(plan.shards(judge.set, "held_out"))]
        same, alike = sum(digest in digests for digest, _ in test), sum(one in hashes for _, one in test)
        rows.append([name, f"{len(test):,}", str(same), str(alike)])
    return ["judge", "test pictures", f"same bytes in the pool '{first}'", "same 8 x 8 hash"], rows
