"""The trainer's speed and MFU, by hand."""

from types import SimpleNamespace

import pytest
import torch

from mug.model.flops import flops_per_sample
from mug.model.presets import ModelConfig, Vocabulary, resolve
from mug.run.training import hardware, metrics


@pytest.mark.parametrize("peak", [None, 4e12])
def test_mfu_counts_the_tokens_that_captions_have(monkeypatch, peak):
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(hardware, "peak_flops", lambda: peak)
    monkeypatch.setattr(metrics.time, "perf_counter", iter([0.0, 1.0, 2.0, 5.0, 5.0]).__next__)
    model = resolve(ModelConfig("tiny"))
    recipe = SimpleNamespace(trainer=SimpleNamespace(global_batch=10), model=model)
    meter = metrics.Meter(recipe, Vocabulary(20, pad=0, bos=1, eos=2, mask=3))
    with meter.waiting():
        pass
    meter.count([{"tokens": torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]])}, {"tokens": torch.tensor([[1, 5, 6, 2]])}])
    figures = meter.read()
    assert figures["images_per_s"] == 2.0 and figures["data_wait"] == 0.2
    if peak is None:
        assert "mfu" not in figures
    else:
        assert figures["mfu"] == pytest.approx(2.0 * sum(flops_per_sample(model, 20, 3.0).values()) / 8e12)
