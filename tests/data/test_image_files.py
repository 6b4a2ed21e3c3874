"""Which files of a folder are images, and that nothing else in it is passed over without a word."""

import logging

import pytest

from mug.data.builders.image_files import folders_in, image_files
from mug.data.left_out import LeftOut


@pytest.fixture
def folder(tmp_path):
    """A class folder as people have them."""
    names = ["a.jpg", "B.PNG", "c.Tif", "d.bmp", "e.GIF", "f.webp", "g.tiff", "deep/er/h.jfif", "no.txt", "deep/no.csv"]
    names += [".ipynb_checkpoints/a-checkpoint.jpg", "deep/.cache/x.png", "._a.jpg", "__MACOSX/a.jpg"]
    for name in names:
        path = tmp_path / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "cat"


def test_images_of_all_formats_are_found_and_the_rest_is_counted(folder, caplog):
    left_out = LeftOut()
    found = [str(path.relative_to(folder)) for path in image_files(folder, left_out)]
    assert found == ["B.PNG", "a.jpg", "c.Tif", "d.bmp", "deep/er/h.jfif", "e.GIF", "f.webp", "g.tiff"]
    kinds = {"hidden folders": 3, "hidden files": 1, "files that are not images by their names": 2}
    assert {kind: count for kind, (count, _) in left_out.kinds.items()} == kinds
    with caplog.at_level(logging.INFO, "mug"):
        left_out.report(folder)
    (line,) = caplog.messages
    assert f"3 hidden folders, the first '{folder}/.ipynb_checkpoints'" in line
    assert f"2 files that are not images by their names, the first '{folder}/no.txt'" in line


def test_links_are_followed_and_end_where_they_lead_back(folder, tmp_path):
    (folder / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.png").write_bytes(b"x")
    (tmp_path / "other" / "back").symlink_to(folder)  # folder/elsewhere/back/elsewhere/…
    (folder / "itself").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    left_out = LeftOut()
    found = {str(path.relative_to(folder)) for path in image_files(folder, left_out)}
    assert {"elsewhere/linked.png", "gone.png", "a.jpg"} < found and len(found) == 10
    assert left_out.kinds["links to folders that are read anyway"] == (2, f"'{folder}/itself'")


def test_folders_are_found_linked_ones_too(folder, tmp_path):
    (tmp_path / "dog").symlink_to(folder)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "stray.jpg").write_bytes(b"x")
    left_out = LeftOut()
    assert folders_in(tmp_path, left_out) == [folder, tmp_path / "dog"]
    assert left_out.kinds == {
        "hidden folders": (1, f"'{tmp_path}/.ipynb_checkpoints'"),
        "files outside the folders": (1, f"'{tmp_path}/stray.jpg'"),
    }
