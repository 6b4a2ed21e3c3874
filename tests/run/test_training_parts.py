"""Schedule, losses, metrics and weight decay, by value."""

import json
import math
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from mug.model.mug import MUG
from mug.model.presets import ModelConfig, Vocabulary, resolve
from mug.run.training import hardware
from mug.run.training.engine import parameter_groups
from mug.run.training.losses import Means, shares, total_loss
from mug.run.training.metrics import Clock, MetricsWriter, read_rows
from mug.run.training.phases import Phases
from mug.run.training.schedule import CosineSchedule


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    port = hardware._free_port()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    schedule = CosineSchedule(peak=2.0, floor=0.5, warmup=100, total=1100)
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
        for mean, share in zip(means, shares(counts, ["caption"]), strict=True)
    )
    assert total / len(rows) == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)


def test_means_weigh_by_count_and_sum_up_to_the_total():
    means = Means()
    loss = {"pixels": torch.tensor(1.0), "caption": torch.tensor(4.0)}
    means.add(loss, {"accuracy/caption": torch.tensor(0.5)}, {"pixels": 10, "caption": 3})
    loss = {"pixels": torch.tensor(3.0), "caption": torch.tensor(0.0)}
    means.add(loss, {"accuracy/caption": torch.tensor(1.0)}, {"pixels": 10, "caption": 1})
    figures = means.reduce({"pixels": 1.0, "caption": 0.1})
    assert figures == pytest.approx(
        {"loss/total": 2.3, "loss/pixels": 2.0, "loss/caption": 3.0, "accuracy/caption": 0.625}
    )


def test_weight_decay_spares_norms_biases_tokens_and_positions():
    model = MUG(resolve(ModelConfig("tiny")), Vocabulary(100, 0, 1, 2, 3))
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.05))
    names = dict(model.named_parameters())
    assert len(decayed) + len(spared) == len(names)
    for name, parameter in names.items():
        special = name.rpartition(".")[2] in ("bias", "cls_token", "mask_token", "position_embed") or "norm" in name
        assert (id(parameter) in spared) == special, name


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


def test_goodput_counts_what_was_not_undone_since_the_first_start(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    clock = Clock(begun=1000.0)
    clock.trained += 30
    saved = clock.state_dict()
    clock.trained += 30  # a crash undoes this
    now = 1100.0
    assert clock.goodput() == pytest.approx(0.6)
    again = Clock(begun=1090.0)
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
    phases = Phases()
    earlier = time.time()
    phases.end("imports")
    begin = time.time()
    time.sleep(0.05)
    before = time.time()
    phases.end("data")
    after = time.time()
    time.sleep(0.05)
    phases.end("data")  # only the first time counts
    seconds = phases.figures()
    assert before - begin - 1e-2 <= seconds["seconds/data"] <= after - earlier + 1e-2
    assert seconds["seconds/total"] == pytest.approx(seconds["seconds/imports"] + seconds["seconds/data"], abs=2e-3)
    created = psutil.Process().create_time()  # known to the second
    assert phases.began == pytest.approx(created, abs=1.1)
    assert before - 1e-2 <= phases.began + seconds["seconds/total"] <= after + 1e-2
