"""What a rank finds out about its machine."""

import dataclasses
from collections import namedtuple

import pytest
from torch import nn
from train_commands import recipe_of

from mug.run.training import node_checks
from mug.run.training.node_checks import check_gpu, model_state_bytes

HEALTHY = "NVIDIA H100 80GB HBM3, 34, 0, No, No, Not Active\n"


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (HEALTHY, None),
        ("NVIDIA GeForce RTX 4090, 61, [N/A], [N/A], [N/A], Not Active\n", None),
        (HEALTHY.replace("34, 0", "34, 3"), "ecc.errors.uncorrected.volatile.total 3"),
        (HEALTHY.replace("No, No", "No, Yes"), "remapped_rows.failure Yes"),
        (HEALTHY.replace("Not Active", "Active"), "hw_slowdown Active"),
        (HEALTHY.replace("34", "93"), "temperature.gpu 93"),
    ],
)
def test_health_of_a_gpu(said, names):
    finding = check_gpu(said)
    assert finding.value.startswith("NVIDIA")
    assert finding.problem is None if names is None else names in finding.problem


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, 20 * 1010),  # 2 + 2 + 4 + 4 + 8 bytes a weight
        (2, 2 * 1010 + 18 * 1010 // 4),
        (3, 4 * 1000 + 18 * 1010 // 4),  # the largest layer gathered, the rest divided
    ],
)
def test_memory_of_a_device_by_stage(monkeypatch, stage, expected):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    model = nn.Sequential(nn.Linear(100, 10, bias=False), nn.LayerNorm(5))
    _, on_device = model_state_bytes(model, {"stage": stage}, world=4)
    assert on_device == expected


def test_offload_moves_the_state_to_the_host(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    model = nn.Linear(100, 10, bias=False)
    on_host, on_device = model_state_bytes(model, offload, world=2)
    assert on_device == 4 * 1000 and on_host == 1.5 * 18 * 1000


@pytest.mark.parametrize(
    ("evals", "workers", "needed", "least"),
    [
        # 2 batches ready of each of 8 workers, of 256 samples: pixels, tokens, position
        ({}, 8, 8 * 2 * 256 * (3 * 224**2 + 8 * 64 + 8), "1g"),
        ({"losses": None}, 8, 2 * 8 * 2 * 256 * (3 * 224**2 + 8 * 64 + 8), "2g"),
        ({}, 0, 0, None),
    ],
)
def test_shared_memory_of_one_rank(monkeypatch, evals, workers, needed, least):
    options = ["--data.workers", str(workers), "--trainer.micro_batch", "256"]
    recipe = dataclasses.replace(
        recipe_of("pretrain", "--config", "run/recipes/mug/cc3m_base.yaml", *options), evals=evals
    )
    usage = namedtuple("Usage", "free")
    for ranks in (1, 8):
        monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _, ranks=ranks: usage(needed * ranks))
        fits = node_checks.shared_memory(recipe, ranks)
        assert fits.problem is None and fits.value.startswith(f"{needed * ranks / 1e9:.2f} GB for loaders, ")
        monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _, ranks=ranks: usage(needed * ranks - 1))
        short = node_checks.shared_memory(recipe, ranks).problem
        if needed:
            assert f"--shm-size={least if ranks == 1 else needed * 8 // 2**30 + 1}" in short and "--ipc=host" in short
