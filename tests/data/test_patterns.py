"""Patterns of shards, compared with bash itself."""

import logging
import os
import subprocess

import fsspec
import pytest

from mug.data.errors import DataError
from mug.data.store.expand import expand
from mug.data.store.patterns import braces, words

PATTERNS = [
    "a{00..02}.tar",
    "{01..10}",
    "{1..010}",
    "{a..c}x",
    "{c..a}",
    "{3..1}",
    "{1..10..4}",
    "{10..1..3}",
    "{-2..2}",
    "{-01..2}",
    "{x,y}{0..1}",
    "{a{0..1},b}.tar",
    "{a,{b,c}{1..2}}z",
    "{,x}.tar",
    "{x}.tar",
    "{}.tar",
    "{1..a}",
    "{00..01}{a..b}.tar",
]


def bash(pattern: str, folder: str = ".", expansion: str = "-B") -> list[str]:
    """What bash makes of a word."""
    script = f"cd -- '{folder}'; printf '%s\\n' {pattern}"
    environment = {"LC_ALL": "C", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", expansion, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_are_those_of_bash(pattern):
    assert braces(pattern) == bash(pattern)


@pytest.mark.parametrize("pattern", ["a{b.tar", "a}b.tar", "{a,b}}c", "{{0..1}.tar", "a\\{0..1.tar"])
def test_braces_that_do_not_close_are_characters_of_a_name(pattern, tmp_path):
    assert braces(pattern) == [pattern]
    (tmp_path / pattern).write_bytes(b"x")
    assert expand(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{pattern}"]


def test_a_range_beyond_all_shards_is_refused():
    for pattern in ("{0..99999999999}", "{5,{0..-99999999999..2}}", "{0..9999}{0..9999}"):
        with pytest.raises(DataError, match="stands for more than"):
            braces(pattern)
    assert len(braces("{1700000000..1700000099}")) == 100


def test_words_are_cut_outside_braces_alone():
    assert words(" a{b,{c,d e}}.tar, f.tar\ng{1..2}.tar,") == ["a{b,{c,d e}}.tar", "f.tar", "g{1..2}.tar"]
    assert words("a{b.tar c.tar") == ["a{b.tar", "c.tar"]


@pytest.fixture
def folder(tmp_path):
    for name in ("0.tar", "1.tar", "a.tar", ".hidden.tar", "B.TAR", "in[1].tar", "in1.tar"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub.tar").mkdir()
    (tmp_path / "sub.tar" / "z.tar").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["[0-1].tar", "[^0].tar", "[!0].tar", "?.tar", "**/z.tar", "*/z.tar", ".h*.tar", "[0-1a].{tar,tar}"]
)
def test_globs_are_those_of_bash(folder, pattern):
    assert [os.path.relpath(path, folder) for path in expand([f"{folder}/{pattern}"])] == bash(pattern, folder)


def test_a_file_of_exactly_this_name_comes_before_what_its_glob_matches(folder):
    assert expand([f"{folder}/in[1].tar"]) == [f"{folder}/in[1].tar"]  # as a shell passes on what it has expanded
    os.remove(folder / "in[1].tar")
    assert expand([f"{folder}/in[1].tar"]) == [f"{folder}/in1.tar"]


def test_what_a_glob_leaves_out_is_reported(folder, caplog):
    with caplog.at_level(logging.WARNING, "mug"):
        assert len(expand(f"{folder}/*.tar")) == 5
    assert f"also matches 1 folders, the first '{folder}/sub.tar'" in caplog.text
    os.symlink(folder / "gone", folder / "link.tar")
    with pytest.raises(DataError, match=r"'.*link\.tar' is a link to nothing"):
        expand(f"{folder}/*.tar")
    with pytest.raises(DataError, match="class of characters"):
        expand(f"{folder}/[[:digit:]].tar")


def test_a_shard_that_is_named_twice_is_reported(folder, caplog):
    with caplog.at_level(logging.WARNING, "mug"):
        assert len(expand(f"{folder}/0.tar {folder}/./0.tar {folder}/1.tar")) == 3
    assert f"1 shards are named more than once, the first '{folder}/0.tar'" in caplog.text


def test_globs_in_a_store():
    store = fsspec.filesystem("memory")
    store.pipe({f"/globs/{name}": b"" for name in ("0.tar", "1.tar", "a.tar", ".b.tar", "deep/2.tar")})
    assert expand("memory://globs/[^0].tar") == ["memory:///globs/1.tar", "memory:///globs/a.tar"]
    assert expand("memory://globs/?.tar") == [f"memory:///globs/{name}.tar" for name in "01a"]
    assert expand("memory://globs/**.tar") == [f"memory:///globs/{name}.tar" for name in "01a"]
