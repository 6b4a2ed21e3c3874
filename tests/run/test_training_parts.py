"""Schedule, losses and metrics, by value."""

import json
import math
import struct
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from mug.run.cluster.losses import WeightedMeans, loss_scales, total_loss
from mug.run.common.errors import RunError
from mug.run.reporting.records import read_rows
from mug.run.training.metrics import GoodputClock, MetricsWriter
from mug.run.training.schedule import CosineSchedule
from mug.run.training.startup_timer import StartupTimer

pytestmark = pytest.mark.usefixtures("one_rank")


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    schedule = CosineSchedule(peak=2.0, minimum=0.5, warmup=100, total=1100)
    assert [schedule(s) for s in (10, 50, 100)] == pytest.approx([0.2, 1.0, 2.0])
    assert schedule(600) == pytest.approx(1.25)
    assert schedule(350) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert [schedule(1100), schedule(2000)] == pytest.approx([0.5, 0.5])


def test_shares_make_a_mean_over_the_global_batch_of_uneven_micro_batches():
    rows = [torch.randn(n, dtype=torch.float32) for n in (1, 5, 0)]
    counts = [{"caption": len(row)} for row in rows]
    means = [row.mean() if len(row) else torch.zeros(()) for row in rows]
    total = sum(
        total_loss({"caption": mean}, {"caption": 1.0}, {"caption": share[0]})
        for mean, share in zip(means, loss_scales(counts, ["caption"]), strict=True)
    )
    assert total / len(rows) == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)


def test_means_weigh_by_count_and_sum_up_to_the_total():
    means = WeightedMeans()
    loss = {"pixels": torch.tensor(1.0), "caption": torch.tensor(4.0)}
    means.add(loss, {"accuracy/caption": torch.tensor(0.5)}, {"pixels": 10, "caption": 3})
    loss = {"pixels": torch.tensor(3.0), "caption": torch.tensor(0.0)}
    means.add(loss, {"accuracy/caption": torch.tensor(1.0)}, {"pixels": 10, "caption": 1})
    metrics = means.reduce({"pixels": 1.0, "caption": 0.1})
    assert metrics == pytest.approx(
        {"loss/total": 2.3, "loss/pixels": 2.0, "loss/caption": 3.0, "accuracy/caption": 0.625}
    )


def test_rows_end_where_their_line_does_and_a_cut_one_is_left_out(tmp_path):
    rows = [{"written": "one\u2028two\x85three"}, {"written": "é"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(text + '{"written": "é'.encode()[:-1])
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_metrics_of_steps_after_the_resumed_one_are_dropped(tmp_path):
    with MetricsWriter(tmp_path, 0) as metrics:
        for step in range(1, 5):
            metrics.write("train", step, {"loss/total": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in mid-write
    with MetricsWriter(tmp_path, 2) as metrics:
        metrics.write("train", 3, {"loss/total": 0.25})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss/total"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def records(data: bytes) -> Iterator:
    """wandb's records in a file in LevelDB's log format: fragments after a header of CRC, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""  # behind wandb's own header
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # the end of a block that takes no header
            place += 2**15 - place % 2**15
        length, kind = struct.unpack_from("<HB", data, place + 4)
        fragment = data[place + 7 : place + 7 + length]
        whole = fragment if kind in (1, 2) else whole + fragment
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)


def test_wandb_has_the_scalars_and_one_run_for_all_launches(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data.shards=https://host/a.tar?sig=SECRET"])
    for resumed, step in ((0, 5), (2, 3)):
        with MetricsWriter(tmp_path, resumed, "wandb") as metrics:
            metrics.write("train", step, {"loss/total": 1.0 / step, "note": "text"})
    until, logged = time.monotonic() + 30, []
    while len(logged) < 2 and time.monotonic() < until:  # wandb's own process writes the last block a little later
        logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        found = [record for log in logs for record in records(log.read_bytes())]
        rows = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in found]
        logged = [(row["step"], row["train/loss/total"]) for row in rows if "train/loss/total" in row]
        time.sleep(0.1)
    assert logged == [(5, 0.2), (3, 1 / 3)], "a step that a rollback repeats is not left out"
    assert len({record.run.run_id for record in found if record.run.run_id}) == 1
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert files and not any(b"SECRET" in path.read_bytes() for path in files)


def test_a_tracker_that_is_unknown_or_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="tracker wandbb is not one of wandb"):
        MetricsWriter(tmp_path, 0, "wandbb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"package wandb is not installed: pip install .*\[wandb\]"):
        MetricsWriter(tmp_path, 0, "wandb")


def test_goodput_counts_what_was_not_undone_since_the_first_start(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    clock = GoodputClock(begun=1000.0)
    clock.trained += 30
    saved = clock.state_dict()
    clock.trained += 30  # a crash undoes this
    now = 1100.0
    assert clock.goodput() == pytest.approx(0.6)
    again = GoodputClock(begun=1090.0)
    again.load_state_dict(saved)
    assert again.goodput() == pytest.approx(0.3)


def test_a_total_that_is_not_finite_spoils_all_gradients_and_a_finite_one_changes_none():
    for loss, spoilt in ((3.0, False), (math.inf, True), (math.nan, True)):
        x = torch.tensor(2.0, requires_grad=True)
        losses = {"pixels": 5 * x, "caption": x.detach() * loss}  # no way from the second to x
        total = total_loss(losses, {"pixels": 1.0, "caption": 0.5}, {"pixels": 1.0, "caption": 1.0})
        total.backward()
        assert x.grad.isnan() if spoilt else (x.grad == 5 and total == 10 + loss)


def test_phases_add_up_to_the_time_since_the_process_began():
    phases = StartupTimer()
    earlier = time.time()
    phases.end("imports")
    begin = time.time()
    time.sleep(0.05)
    before = time.time()
    phases.end("data")
    after = time.time()
    time.sleep(0.05)
    phases.end("data")  # only the first time counts
    seconds = phases.metrics()
    assert before - begin - 1e-2 <= seconds["seconds/data"] <= after - earlier + 1e-2
    assert seconds["seconds/total"] == pytest.approx(seconds["seconds/imports"] + seconds["seconds/data"], abs=2e-3)
    created = psutil.Process().create_time()  # known to the second
    assert phases.began == pytest.approx(created, abs=1.1)
    assert before - 1e-2 <= phases.began + seconds["seconds/total"] <= after + 1e-2
