"""The trainer's speed and MFU, by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mug.model.flops import flops_per_sample
from mug.model.presets import ModelConfig, Vocabulary, resolve
from mug.run.pretrain import Pretraining
from mug.run.training import hardware, metrics


@pytest.mark.parametrize("peak", [None, 4e12])
def test_speed_and_mfu(monkeypatch, peak):
    monkeypatch.setattr(hardware, "peak_flops", lambda: peak)
    monkeypatch.setattr(metrics.time, "perf_counter", iter([0.0, 1.0, 2.0, 5.0, 5.0]).__next__)
    meter = metrics.Meter(batch=10)
    with meter.waiting():
        pass
    meter.count(6e12)
    figures = meter.read()
    assert figures["images_per_s"] == 2.0 and figures["data_wait"] == 0.2 and "goodput" not in figures
    assert figures.get("mfu") == (None if peak is None else pytest.approx(6e12 / (5 * 4e12)))


def test_the_steps_operations_are_those_of_the_tokens_that_captions_have():
    model, vocabulary = resolve(ModelConfig("tiny")), Vocabulary(20, pad=0, bos=1, eos=2, mask=3)
    recipe = SimpleNamespace(model=model, weighted={"pixels": 1.0, "caption": 0.1})
    description = {"vocabulary": dataclasses.asdict(vocabulary)}
    task = Pretraining(recipe, description, files={}, neighbours=None, spikes=None)
    micro_batches = [{"tokens": torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]])}, {"tokens": torch.tensor([[1, 5, 6, 2]])}]
    expected = 2 * sum(flops_per_sample(model, 20, 2.5).values()) + sum(flops_per_sample(model, 20, 4.0).values())
    assert task.step_flops(micro_batches) == pytest.approx(expected)
