"""The short form of fuzz.py: no traceback, no hang, no sample in no count."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", fuzz.SEEDS)
def test_mutated_inputs_are_used_replaced_or_left_out_and_reported(kind):
    found = fuzz.fuzz(kind, 400 if kind in ("image", "caption") else 60, seed=1)
    assert found.total() and {*found} <= {"used", "replaced", "left out", "no caption, said", "shards refused by name"}


# A histogram that pyarrow ends the process for, a column whose name is not UTF-8, keys that lie nowhere.
@pytest.mark.parametrize(("kind", "number"), [("parquet", 965), ("parquet", 1366), ("arrow", 378)])
def test_what_was_once_at_fault(kind, number):
    assert fuzz.check(kind, number, seed=0)


def test_what_is_whole_is_used(tmp_path):
    for kind in ("tar", "parquet", "arrow"):
        for i, data in enumerate(fuzz.SEEDS[kind]):
            (tmp_path / f"{kind}{i}").mkdir()
            found = fuzz.check_shard(data, kind, tmp_path / f"{kind}{i}")
            assert found == {"used": fuzz.PAIRS, "left out": fuzz.PAIRS * (kind == "tar")}
