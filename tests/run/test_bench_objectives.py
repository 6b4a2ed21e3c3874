"""Objectives next to their peers: both do the same work, and the row that comes of it."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mug.run import bench_objectives
from mug.run.benchmarks import objective_step
from mug.run.benchmarks.objective_step import build_ours, compare_with_peer, describe, median_interval
from mug.run.benchmarks.peers import PEERS, Peer, normalized
from mug.run.benchmarks.synthetic import full_batch
from mug.run.common.console import Console
from mug.run.common.errors import RunError

# FLOP of a peer's forward pass over ours; causal attention counts whole there. open_clip's CoCa has more MLPs on the
# caption's 24 tokens, and ours one more pooling of the image's 256 states.
WORK = {"clip": 1.0, "coca": 0.976, "mae": 1.0, "simclr": 1.0, "simsiam": 1.0}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_does_the_same_work_and_learns_all_its_weights(name):
    pytest.importorskip(PEERS[name].package)
    ours = build_ours(name, "tiny")
    batch = full_batch(ours, 4)
    peer = PEERS[name].build(ours.config, ours.context.vocabulary)
    inputs = batch | ({"pixels": normalized(batch["image"].float() / 255)} if "image" in batch else {})
    with FlopCounterMode(display=False) as counter:
        loss = peer(inputs)
    assert counter.get_total_flops() / (ours.flops(batch) / 3) == pytest.approx(WORK[name], abs=0.02)
    loss.backward()
    assert loss.shape == () and all(p.grad is not None for p in peer.parameters() if p.requires_grad)


def test_the_batch_has_no_padding():
    ours = build_ours("clip", "tiny")
    batch = full_batch(ours, 3)
    assert batch["tokens"].shape == (3, 24) and (batch["tokens"] != ours.context.vocabulary.pad).all()
    assert torch.equal(batch["tokens"], full_batch(ours, 3)["tokens"])


def test_our_step_is_forward_backward_and_adamw_on_the_weighted_sum():
    ours, same = build_ours("coca", "tiny"), build_ours("coca", "tiny")
    same.load_state_dict(ours.state_dict())
    batch = full_batch(ours, 2)
    objective_step.our_step(ours, batch)()
    losses, _ = same(batch)
    (losses["contrastive"] + 2 * losses["caption"]).backward()
    torch.optim.AdamW(same.parameters(), lr=objective_step.LEARNING_RATE).step()
    for mine, expected in zip(ours.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n, rank", [(5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6)])
def test_intervals_are_those_of_the_sign_tests_table(n, rank):
    values = [float(value) for value in torch.randperm(n) + 1]
    assert median_interval(values) == ((n + 1) / 2, rank, n + 1 - rank)


def test_a_package_that_is_missing_is_one_line_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(PEERS, "coca", Peer("nowhere", PEERS["coca"].build))
    monkeypatch.setattr(bench_objectives, "compare_with_peer", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["bench_objectives.py", "--objective", "mae", "coca"])
    with pytest.raises(RunError, match=r"package nowhere is not installed: pip install .*\[bench\]"):
        bench_objectives.main(Console(0))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--objective", "clip", "aimv2"], "--objective aimv2 is not one of clip, coca, mae, simclr, simsiam"),
        (["--preset", "giant"], "--preset giant is not one of tiny"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["bench_objectives.py", *options])
    with pytest.raises(RunError, match=message):
        bench_objectives.parse()


@pytest.mark.slow
def test_a_row_holds_time_and_memory_of_both():
    pytest.importorskip("open_clip")
    row = compare_with_peer("clip", "tiny", 4, 2)
    assert row["low"] <= row["ratio"] <= row["high"] and row["memory_ratio"] == row["ours_mb"] / row["peer_mb"]
    assert row["images_per_s"] == pytest.approx(4e3 / row["ours_ms"])
    moments_mb = 2 * 4 * 4.03e6 / 1e6
    assert min(row["ours_mb"], row["peer_mb"]) > moments_mb
    assert describe(row).startswith("clip tiny, batch 4: ") and " of the time of open_clip " in describe(row)
