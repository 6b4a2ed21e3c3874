"""The trainer's speed and MFU, by hand."""

import pytest
import torch

from mug.model.objectives.mug import MUG, MUGConfig, stage_flops
from mug.model.objectives.objective import Context
from mug.model.presets import Vocabulary, resolve
from mug.run.cluster import hardware
from mug.run.training import metrics


@pytest.mark.parametrize("peak", [None, 4e12])
def test_speed_and_mfu(monkeypatch, peak):
    monkeypatch.setattr(hardware, "peak_flops", lambda: peak)
    monkeypatch.setattr(metrics.time, "perf_counter", iter([0.0, 1.0, 2.0, 5.0, 5.0]).__next__)
    meter = metrics.Throughput(batch=10)
    with meter.waiting():
        pass
    meter.count(6e12)
    found = meter.read()
    assert found["images_per_s"] == 2.0 and found["data_wait"] == 0.2 and "goodput" not in found
    assert found["tflops"] == pytest.approx(6 / 5)
    assert found.get("mfu") == (None if peak is None else pytest.approx(6e12 / (5 * 4e12)))


@pytest.mark.parametrize("losses", [("pixels", "caption"), ("caption",)])
def test_the_steps_operations_are_those_of_the_tokens_that_captions_have(losses):
    config, vocabulary = resolve(MUGConfig("tiny")), Vocabulary(20, pad=0, bos=1, eos=2, mask=3)
    model = MUG(config, Context(vocabulary=vocabulary, losses=losses))
    for tokens, mean in (([[1, 5, 2, 0], [1, 2, 0, 0]], 2.5), ([[1, 5, 6, 2]], 4.0)):
        expected = len(tokens) * sum(stage_flops(config, 20, mean, losses).values())
        assert model.flops({"tokens": torch.tensor(tokens)}) == pytest.approx(expected)
