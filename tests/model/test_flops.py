"""FLOP a sample: the published table, and PyTorch's own count of matrix products."""

import pytest
from plain import counted_flops

from mug.model.objectives.mug import MUGConfig, stage_flops
from mug.model.presets import resolve

TABLE = {
    "base": ("25.9", "32.1", "37.9", "9.0", "104.9", 3803),
    "large": ("91.6", "32.2", "38.6", "9.0", "171.3", 2329),
    "huge": ("247.7", "42.7", "40.4", "9.0", "339.8", 1174),
}


@pytest.mark.parametrize("preset", TABLE)
def test_the_published_table_to_the_printed_digit(preset):
    stages = stage_flops(resolve(MUGConfig(preset=preset)), 30_522)
    assert list(stages) == ["encoder", "pixel_decoder", "text_decoder", "caption_head"]
    total = sum(stages.values())
    printed = [f"{flop / 1e9:.1f}" for flop in (*stages.values(), total)]
    assert (*printed, round(0.5 * 798e12 / total)) == TABLE[preset]


def counted(function, *inputs, **options):
    """(FLOP of the call, its result)."""
    with counted_flops() as counter:
        result = function(*inputs, **options)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("captioning", ["autoregressive", "masked-language"])
def test_forward_equals_the_count_that_pytorch_makes(make_model, make_batch, captioning):
    model = make_model(captioning=captioning, text_unimodal_layers=2)
    batch = make_batch(model, [6])
    visible, masked = model.mask(batch["position"])
    causal = captioning == "autoregressive"
    encoder, encoded = counted(model.encoder, batch["image"], visible)
    pixels, _ = counted(model.pixel_decoder, encoded, visible, masked)
    text, hidden = counted(model.text_decoder, batch["tokens"], encoded, causal=causal)
    head, _ = counted(model.text_decoder.head, hidden)
    if causal:  # PyTorch counts causal attention whole: 3 layers, two products, T = 8, D = 32
        text -= 3 * 2 * 8**2 * 32
    expected = {"encoder": encoder, "pixel_decoder": pixels, "text_decoder": text, "caption_head": head}
    forward = {stage: flop / 3 for stage, flop in stage_flops(model.config, model.vocabulary.size).items()}
    assert forward == pytest.approx(expected, rel=1e-9)


def test_stages_of_a_loss_that_is_not_computed_are_left_out(make_model):
    config = make_model().config
    stages = stage_flops(config, 20)
    assert stage_flops(config, 20, losses=("pixels",)) == {k: stages[k] for k in ("encoder", "pixel_decoder")}
    captions = {k: stages[k] for k in ("encoder", "text_decoder", "caption_head")}
    assert stage_flops(config, 20, losses=("caption",)) == captions
