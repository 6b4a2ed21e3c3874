import hashlib
import json
import logging
import random

import pytest

from mug.data.bad_samples import FREE, BadSampleLog, Replacement
from mug.data.errors import DataError


def bad(position: int, shard: str = "a.tar", samples: int = 1000) -> Replacement:
    return Replacement(position, shard, f"key{position}", "JPEG damaged", samples, epoch=position // 500)


@pytest.fixture
def open_bad_sample_log(tmp_path):
    return lambda **limits: BadSampleLog(tmp_path / "bad_samples.jsonl", **{"limit": 1.0, "shard_limit": 1.0, **limits})


def test_lines_are_in_the_order_of_positions_and_hashed_one_by_one(tmp_path, open_bad_sample_log):
    bad_samples = open_bad_sample_log()
    assert bad_samples.state_dict() == {"entries": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    bad_samples.add([bad(7), bad(3, "b.tar")], 10)
    bad_samples.add([], 20)
    bad_samples.add([bad(25)], 30)
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"position": p, "shard": s, "key": f"key{p}", "reason": "JPEG damaged", "shard_samples": 1000, "epoch": 0}
        for p, s in [(3, "b.tar"), (7, "a.tar"), (25, "a.tar")]
    ]
    digest = hashlib.sha256(b"").digest()
    for line in lines:
        digest = hashlib.sha256(digest + line.encode()).digest()
    assert bad_samples.state_dict() == {"entries": 3, "sha256": digest.hex()}


def test_the_state_does_not_depend_on_how_often_it_is_added_to(tmp_path):
    entries = [bad(p, random.choice("ab")) for p in range(0, 100, 3)]
    states = []
    for chunk in (10, 50, 100):
        bad_samples = BadSampleLog(tmp_path / f"{chunk}.jsonl", 1.0, 1.0)
        for end in range(chunk, 101, chunk):
            reported = [e for e in entries if end - chunk <= e.position < end]
            bad_samples.add(random.sample(reported, len(reported)), end)  # in whatever order the ranks come
        states.append(bad_samples.state_dict())
    assert states[0] == states[1] == states[2] and states[0]["entries"] == 34


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path, open_bad_sample_log):
    bad_samples = open_bad_sample_log()
    bad_samples.add([bad(1), bad(2)], 10)
    state = bad_samples.state_dict()
    bad_samples.add([bad(11)], 20)
    whole = (tmp_path / "bad_samples.jsonl").read_text()
    resumed = open_bad_sample_log()
    resumed.load_state_dict(state)
    assert (tmp_path / "bad_samples.jsonl").read_text().splitlines() == whole.splitlines()[:2]
    resumed.add([bad(11)], 20)
    assert (tmp_path / "bad_samples.jsonl").read_text() == whole
    assert resumed.state_dict() == bad_samples.state_dict() and resumed.in_shard == bad_samples.in_shard


@pytest.mark.parametrize("damage", [None, "", "{}\n", '{"position": 1', "x\ny\n"])
def test_a_file_that_is_another_one_is_put_aside_and_reported(tmp_path, open_bad_sample_log, caplog, damage):
    bad_samples = open_bad_sample_log()
    bad_samples.add([bad(1), bad(2)], 10)
    state = bad_samples.state_dict()
    file = tmp_path / "bad_samples.jsonl"
    file.unlink() if damage is None else file.write_text(damage)
    resumed = open_bad_sample_log()
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    assert "bad_samples.jsonl does not hold the checkpoint's 2 entries" in caplog.text
    assert resumed.state_dict() == state
    if damage is not None:
        assert (tmp_path / "bad_samples.aside.jsonl").read_text() == damage
    resumed.add([bad(11)], 20)
    assert len(file.read_text().splitlines()) == 1 and resumed.entries == 3


def test_too_many_of_all_samples_stop_the_run_and_are_written_first(tmp_path, open_bad_sample_log):
    bad_samples = open_bad_sample_log(limit=0.01)
    bad_samples.add([bad(p) for p in range(FREE + 10)], 1000)
    with pytest.raises(
        DataError, match=rf"^{FREE + 21} of 2,000 samples could not .* data.max_bad_fraction 0.01 .*key999"
    ):
        bad_samples.add([bad(p) for p in range(989, 1000)], 2000)
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == FREE + 21


def test_too_many_of_one_shard_stop_the_run(open_bad_sample_log):
    bad_samples = open_bad_sample_log(shard_limit=0.1)
    bad_samples.add([bad(p, "b.tar", 100) for p in range(FREE + 10)], 400)
    bad_samples.add([bad(500 + p, "b.tar", 100) for p in range(FREE + 10)], 900)  # the next epoch meets the same ones
    with pytest.raises(
        DataError, match=rf"^shard 'b.tar': {FREE + 11} of 100 samples .* data.max_bad_fraction_in_shard 0.1"
    ):
        bad_samples.add([bad(950, "b.tar", 100)], 1000)
