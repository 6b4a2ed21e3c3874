"""The images below a folder with the files of their captions and jsons; other files are counted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mug.data.builders.image_files import Note, is_image, walk
from mug.data.captions import TEXT_EXTENSIONS, rank
from mug.data.left_out import LeftOut


@dataclass(frozen=True)
class PairFiles:
    """An image, and the files of its text and json: None where there is none."""

    image: Path
    text: Path | None
    json: Path | None


def pair_files(
    folder: Path, caption: str | None, left_out: LeftOut, wanted: Callable[[Path], bool]
) -> Iterator[PairFiles]:
    """Yields the images below `folder` by path, the files of a folder before those of its subfolders.

    The text of an image is the file with the extension `caption`; without it, the .txt, else that of another usual
    one, such as `a.caption.txt`. What is left out is counted if it is `wanted`, a function of its path within `folder`.

    Raises:
        DataError: a folder cannot be read.
    """

    def note(kind: str, path: Path) -> None:
        if wanted(path.relative_to(folder)):
            left_out.add(kind, f"'{path}'")

    for parent, names in walk(folder, note):
        yield from _pairs(parent, names, caption, note)


def _pairs(folder: Path, names: list[str], caption: str | None, note: Note) -> Iterator[PairFiles]:
    """Yields the images among the files of a folder, with their texts and jsons."""
    files = [name for name in names if _is_file(folder / name, note)]
    images = [folder / name for name in files if is_image(name)]
    texts, jsons = _texts_of(files, caption), {stem: name for stem, name in _stems(files) if _suffix(name) == ".json"}
    used = {image.name for image in images}
    for image in images:
        text, json = texts.get(image.stem), jsons.get(image.stem)
        used.update(name for name in (text, json) if name)
        yield PairFiles(image, folder / text if text else None, folder / json if json else None)
    stems = {image.stem for image in images}
    for name in files:
        if name not in used:
            note(_kind(name, stems), folder / name)


def _is_file(path: Path, note: Note) -> bool:
    if path.is_file():
        return True
    note("links to nothing" if path.is_symlink() else "devices and the like", path)
    return False


def _kind(name: str, stems: set[str]) -> str:
    """Returns the kind of a file that is not in a pair, where images have these stems."""
    suffix = _suffix(name)
    if suffix in (".txt", ".json"):
        return f"other {suffix} files of an image" if Path(name).stem in stems else f"{suffix} files without an image"
    return f"'{suffix}' files" if suffix else "files without an extension"


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _stems(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (name without its last extension, name) of each file that has one."""
    return ((name.rpartition(".")[0], name) for name in names if "." in name)


def _texts_of(names: list[str], caption: str | None) -> dict[str, str]:
    """Returns stem of an image → name of the file of its text, among the names in a folder."""
    if caption is not None:
        end = "." + caption.lstrip(".")
        return {name[: -len(end)]: name for name in names if name.endswith(end)}
    found: dict[str, tuple[int, str]] = {}
    for stem, name in _stems(names):
        extension = name.rpartition(".")[2].lower()
        candidates = [(stem, extension)] if extension in (*TEXT_EXTENSIONS, "txt") else []
        if extension == "txt" and "." in stem:
            candidates.append((stem.rpartition(".")[0], stem.rpartition(".")[2]))
        for owner, kind in candidates:
            place = rank(kind)
            if place is not None and (owner not in found or place <= found[owner][0]):
                found[owner] = place, name  # of two in one place the later: lower case comes last
    return {owner: name for owner, (_, name) in found.items()}
