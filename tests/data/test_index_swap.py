"""An index that is brought up to date while it is read; what of an earlier build is used again, and what never is."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faulty_server import Server, files

from mug.data.builders.writers import write_tar
from mug.data.config import DataConfig
from mug.data.errors import DataError
from mug.data.index.build import build_index, index_for
from mug.data.index.index import Index
from mug.data.reader import Reader
from mug.data.store.expand import without_signatures


def shard(path: Path, *captions: str) -> str:
    pairs = ([(f"{i}.png", b"image"), (f"{i}.txt", text.encode())] for i, text in enumerate(captions))
    write_tar(path, [file for pair in pairs for file in pair])
    return str(path)


def rebuilt(urls: list[str], out: Path) -> list:
    shards = build_index(urls, out, 0)
    assert [one.failure for one in shards] == [""] * len(urls)
    return shards


def test_who_has_an_index_open_keeps_it_until_the_end(tmp_path):
    urls = [shard(tmp_path / f"{i}.tar", "a", "b") for i in range(3)]
    rebuilt(urls, tmp_path / "index")
    opened = Index.open(tmp_path / "index")  # of its shards it has read none
    for turn in range(3):
        shard(tmp_path / "1.tar", *"abcde"[: turn + 3])
        assert [one.reused for one in rebuilt(urls, tmp_path / "index")] == [True, False, True]
        assert Index.open(tmp_path / "index").counts_S.tolist() == [2, turn + 3, 2]
        for mine in (opened, pickle.loads(pickle.dumps(opened))):  # as a worker that starts now has it
            assert [len(mine.rows(i)) for i in range(3)] == [2, 2, 2]
            assert mine.fingerprint == opened.fingerprint
            mine.rows.cache_clear()
    held = pickle.dumps(opened)
    del opened, mine
    rebuilt(urls, tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 5  # three shards, the manifest and the lock
    with pytest.raises(DataError, match="the build that was read is gone: restart the run"):
        pickle.loads(held)


def test_an_index_is_never_away_while_it_is_built_again(tmp_path):
    urls = [shard(tmp_path / f"{i}.tar", "a") for i in range(60)]
    rebuilt(urls, tmp_path / "index")
    stop, seen, wrong = threading.Event(), 0, []

    def look() -> None:
        nonlocal seen
        while not stop.is_set():
            try:
                assert len(Index.open(tmp_path / "index").rows(5)) == 1
                seen += 1
            except DataError as error:
                wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for turn in range(4):
        shard(tmp_path / "59.tar", *"ab"[: turn % 2 + 1])
        rebuilt(urls, tmp_path / "index")
    stop.set()
    thread.join()
    assert seen > 10 and not wrong


def test_two_builds_at_once_both_end_well(tmp_path):
    path = shard(tmp_path / "one.tar", "a", "b")
    root = Path(__file__).parents[2]
    command = [sys.executable, "run/index_shards.py", path, "--out", str(tmp_path / "index"), "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=root, **pipes) for _ in "ab"]
    for one in both:
        out, said = one.communicate()
        assert (one.returncode, said) == (0, "") and "fingerprint" in out


def test_a_failed_build_leaves_the_index_as_it_was(tmp_path):
    urls = [shard(tmp_path / f"{i}.tar", "a") for i in range(2)]
    rebuilt(urls, tmp_path / "index")
    before = Index.open(tmp_path / "index").fingerprint
    (tmp_path / "1.tar").write_bytes(b"no tar" * 1000)
    assert build_index(urls, tmp_path / "index", 0)[1].failure
    assert Index.open(tmp_path / "index").fingerprint == before
    with pytest.raises(DataError, match=r"1\.tar'.*changed since it was indexed"):
        Reader.open(str(tmp_path / "index"), DataConfig(cache=str(tmp_path))).read(1, 0)


def test_an_index_as_it_was_written_before_is_read_and_replaced(tmp_path):
    """Its rows had no key in their names, and its manifest did not name them."""
    import pyarrow as pa

    urls = [shard(tmp_path / f"{i}.tar", "a", "b") for i in range(2)]
    rebuilt(urls, tmp_path / "index")
    now = Index.open(tmp_path / "index")
    for i in range(2):
        (tmp_path / "index" / now.files[i]).rename(tmp_path / "index" / f"0000{i}.arrow")
    with pa.ipc.open_file(tmp_path / "index" / "manifest.arrow") as file:
        batch = file.get_batch(0)
    older = batch.select([name for name in batch.schema.names if name not in ("seal", "rows")])
    with pa.ipc.new_file(tmp_path / "index" / "manifest.arrow", older.schema) as writer:
        writer.write_batch(older)
    opened = Index.open(tmp_path / "index")
    assert len(opened.rows(1)) == 2 and opened.fingerprint == now.fingerprint
    rebuilt(urls, tmp_path / "index")
    assert len(pickle.loads(pickle.dumps(opened)).rows(0)) == 2
    assert Index.open(tmp_path / "index").fingerprint == now.fingerprint


def same_name_size_and_time(tmp_path: Path) -> tuple[str, str]:
    for name, words in (("a", "a red barn"), ("b", "its owner")):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar", words, words)
        os.utime(tmp_path / name / "0.tar", ns=(10**18, 10**18))
    return tuple(str(tmp_path / name / "0.tar") for name in "ab")


def test_the_index_of_another_set_is_not_used(tmp_path):
    a, b = same_name_size_and_time(tmp_path)
    rebuilt([a], tmp_path / "index")
    first = Index.open(tmp_path / "index").rows(0).text_length.tolist()
    assert [one.reused for one in rebuilt([b], tmp_path / "index")] == [False]
    assert Index.open(tmp_path / "index").rows(0).text_length.tolist() == [9, 9] != first


def test_a_file_that_took_the_place_of_another_of_its_size_and_time_is_scanned(tmp_path):
    a, b = same_name_size_and_time(tmp_path)
    rebuilt([a], tmp_path / "index")
    fingerprint = index_for(a, tmp_path).fingerprint
    os.replace(b, a)
    os.utime(a, ns=(10**18, 10**18))
    assert [one.reused for one in rebuilt([a], tmp_path / "index")] == [False]
    assert index_for(a, tmp_path).fingerprint != fingerprint


SECRETS = ("X-Amz-Signature", "5eCrE7", "password")


def test_signatures_are_kept_nowhere(tmp_path, caplog):
    contents = {}
    for i in range(3):
        contents[f"/{i}.tar"] = Path(shard(tmp_path / f"{i}.tar", f"caption {i}")).read_bytes()
    with Server(files(contents)) as server:
        patterns = f"{server.url}/{{0..2}}.tar?X-Amz-Signature=5eCrE7&x=1"
        config = DataConfig(cache=str(tmp_path / "cache"))
        caplog.set_level("DEBUG")
        reader = Reader.open(patterns, config)
        captions = [pickle.loads(pickle.dumps(reader)).read(i, 0)[1].decode() for i in range(3)]
        assert captions == ["caption 0", "caption 1", "caption 2"]
        again = Reader.open(patterns.replace("5eCrE7", "5eCrE7two"), config)  # signed again: the same index and shards
        assert again.index.folder == reader.index.folder
        asked = len(server.ranges("/0.tar"))
        assert again.read(0, 0)[1] == b"caption 0" and len(server.ranges("/0.tar")) == asked
        rebuilt([f"{server.url}/0.tar?X-Amz-Signature=5eCrE7"], tmp_path / "index")
        with pytest.raises(DataError, match="is of signed URLs, whose signatures no index keeps"):
            Reader.open(str(tmp_path / "index"), config)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path
    said = [record.getMessage() for record in caplog.records if record.name == "mug"]
    assert not any(secret in line for line in said for secret in SECRETS)


def test_the_command_indexes_signed_urls(tmp_path):
    """It looks at captions at its end, for which it needs what the index does not keep."""
    contents = {"/0.tar": Path(shard(tmp_path / "0.tar", "", "")).read_bytes()}
    with Server(files(contents)) as server:
        url = f"{server.url}/0.tar?X-Amz-Signature=5eCrE7"
        command = [sys.executable, "run/index_shards.py", url, "--out", str(tmp_path / "index"), "--workers", "1"]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: none of 2 samples read have a caption" in done.stdout and "5eCrE7" not in done.stdout


def test_what_is_left_of_signed_patterns():
    signed = "https://u:password@h/{a,b}.tar?X-Amz-Signature=5eCrE7, s3://b/{0..9}.tar https://h/c.tar?5eCrE7"
    assert without_signatures(signed) == "https://h/{a,b}.tar,s3://b/{0..9}.tar,https://h/c.tar"
    assert without_signatures("s3://b/00?.tar") == "s3://b/00?.tar"
    assert without_signatures("/data/a b, c?.tar") == "/data/a b, c?.tar"


def test_a_recipe_is_recorded_without_signatures(tmp_path):
    from mug.run.pretrain import DEFAULT_RECIPE
    from mug.run.training.recipe import parse_command, recorded

    shards, held_out = "https://u:password@h/{0..2}.tar?X-Amz-Signature=5eCrE7", "https://h/a?5eCrE7"
    options = {
        "deepspeed": "ds_configs/zero1.json",
        "output": tmp_path,
        "data.shards": shards,
        "data.held_out": held_out,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = parse_command("pretrain.py", "", DEFAULT_RECIPE, arguments)
    assert "5eCrE7" in command.recipe.data.shards
    data = recorded(command.recipe)["data"]
    assert (data["shards"], data["held_out"]) == ("https://h/{0..2}.tar", "https://h/a")
    assert not any(secret in repr(recorded(command.recipe)) for secret in SECRETS)
