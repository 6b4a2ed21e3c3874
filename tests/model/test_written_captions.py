"""Greedy and beam search against each other and against all captions there are."""

import itertools

import pytest
import torch

from mug.model.generate import Writer, beam_search, word_attention, write
from mug.model.presets import Vocabulary


def step_log_p(model, tokens, memory):
    """float64 [B, T, V]: log-probability of what follows each token; PAD and BOS never do."""
    logits = model.text_decoder.head(model.text_decoder(tokens, memory)).double()
    logits[..., [model.vocabulary.pad, model.vocabulary.bos]] = -torch.inf
    return logits.log_softmax(-1)


def mean_log_p(model, tokens, memory):
    """float64 [B]: mean log-probability of the tokens after BOS, PAD left out."""
    log_p = step_log_p(model, tokens, memory)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    written = tokens[:, 1:] != model.vocabulary.pad
    return log_p.masked_fill(~written, 0).sum(1) / written.sum(1)


@pytest.fixture(scope="module")
def sharp(make_model):
    """Function (options) → untrained model whose next-token distributions are far from uniform."""

    def make(**options):
        model = make_model(tied_head=False, **options)
        with torch.no_grad():
            model.text_decoder.head.weight.mul_(12)
        return model

    return make


def caption(model, memory, beams=1):
    return write(model.text_decoder, model.vocabulary, memory, beams)


def memory_of(model, B, seed=0):
    return torch.randn(B, 5, model.config.width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_greedy_takes_the_likeliest_token_at_every_step(sharp):
    model = sharp()
    memory = memory_of(model, 40)
    tokens = caption(model, memory)
    likeliest = step_log_p(model, tokens, memory).argmax(-1)
    ended = 0
    for row, best in zip(tokens.tolist(), likeliest.tolist(), strict=True):
        assert row[0] == 1
        end = row.index(2) if 2 in row else len(row) - 1
        assert row[1 : end + 1] == best[:end]
        assert set(row[end + 1 :]) <= {0}
        ended += end < len(row) - 1
    assert 0 < ended < 40


@torch.inference_mode()
def test_one_beam_is_greedy(sharp):
    model = sharp()
    memory = memory_of(model, 40)
    writer = Writer(model.text_decoder, model.vocabulary, memory)
    assert torch.equal(beam_search(writer, 1), caption(model, memory))


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_as_many_beams_as_captions_find_the_best_of_all(sharp, seed):
    toy = Vocabulary(size=5, pad=0, bos=1, eos=2, mask=None)
    model = sharp(vocabulary=toy, text_length=4)
    words, captions = (2, 3, 4), set()
    for choice in itertools.product(words, repeat=3):
        end = choice.index(2) + 1 if 2 in choice else 3
        captions.add((1, *choice[:end], *[0] * (3 - end)))
    captions = torch.tensor(sorted(captions))
    assert len(captions) == 1 + 2 + 4 * 3
    memory = memory_of(model, 16, seed)
    scores = torch.stack([mean_log_p(model, captions, m.expand(len(captions), -1, -1)) for m in memory])
    best = captions[scores.argmax(1)]
    assert torch.equal(caption(model, memory, toy.size**3), best)
    assert not torch.equal(caption(model, memory), best)


def beams_by_hand(model, memory, beams: int) -> list[int]:
    """One image's caption: lists of (tokens, log-probability), the whole caption run through the model at each step."""
    running, aside, last = [([model.vocabulary.bos], 0.0)], [], model.config.text_length - 1
    for t in range(1, last + 1):
        longer = []
        for tokens, log_p in running:
            step_V = step_log_p(model, torch.tensor([tokens]), memory)[0, -1]
            longer += [([*tokens, token], log_p + step.item()) for token, step in enumerate(step_V)]
        longer = sorted(longer, key=lambda one: -one[1])[: 2 * beams]
        ends = [tokens[-1] == model.vocabulary.eos or t == last for tokens, _ in longer]
        aside += [(log_p / t, tokens) for (tokens, log_p), end in zip(longer[:beams], ends, strict=False) if end]
        aside = sorted(aside, reverse=True)[:beams]
        running = [one for one, end in zip(longer, ends, strict=True) if not end][:beams]
        if len(aside) == beams and (not running or running[0][1] / t <= aside[-1][0]):
            break
    return aside[0][1]


@torch.inference_mode()
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_those_of_a_search_over_lists(sharp, beams):
    model = sharp()
    memory = memory_of(model, 12)
    found = [[token for token in row if token] for row in caption(model, memory, beams).tolist()]
    assert found == [beams_by_hand(model, memory[b : b + 1], beams) for b in range(12)]
    assert len({len(caption) for caption in found}) > 1


@torch.inference_mode()
def test_images_do_not_disturb_each_other(sharp):
    model = sharp()
    memory = memory_of(model, 8)
    for beams in (2, 4):
        together = caption(model, memory, beams)
        alone = torch.cat([caption(model, memory[b : b + 1], beams) for b in range(8)])
        assert torch.equal(together, alone)
    assert len(together.unique(dim=0)) > 1


@torch.inference_mode()
def test_more_beams_find_better_captions_on_average(sharp):
    model = sharp()
    memory = memory_of(model, 40)
    scores = [mean_log_p(model, caption(model, memory, beams), memory).mean() for beams in (1, 4, 16)]
    assert scores[0] < scores[1] < scores[2]


@torch.inference_mode()
def test_neither_pad_nor_bos_is_ever_written(sharp):
    model = sharp()
    with torch.no_grad():
        model.text_decoder.norm.weight.zero_()
        model.text_decoder.norm.bias.copy_(model.text_decoder.head.weight[0] + model.text_decoder.head.weight[1])
    memory = memory_of(model, 3)
    raw = model.text_decoder.head(model.text_decoder(torch.tensor([[1]]).expand(3, -1), memory))
    assert set(raw.topk(2).indices.flatten().tolist()) == {0, 1}  # the model itself wants nothing else
    for tokens in (caption(model, memory), caption(model, memory, 3)):
        for row in tokens.tolist():
            end = row.index(2) if 2 in row else len(row) - 1
            assert not {0, 1} & set(row[1 : end + 1])


@torch.inference_mode()
def test_word_attention_is_that_of_the_last_layer(sharp):
    """Against PyTorch's own attention, whose values are the unit vectors: its output is then its weights."""
    model = sharp(text_cross_layers=2)
    memory, tokens = memory_of(model, 3), torch.tensor([[1, 5, 6, 2]] * 3)
    ours = word_attention(model.text_decoder, tokens, memory)
    x = model.text_decoder.embed(tokens) + model.text_decoder.position_embed[:4]
    for block in model.text_decoder.blocks[:-1]:
        x = block(x, memory, causal=True)
    last = model.text_decoder.blocks[-1]
    x = x + last.attn(x, last.norm1, True, None, None)
    heads = last.cross_attn.heads
    q = last.cross_attn.q(last.norm_cross(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = last.cross_attn.kv(memory).unflatten(-1, (2, heads, -1))[:, :, 0].transpose(1, 2)
    units = torch.eye(5).expand(3, heads, 5, 5)
    weights = torch.nn.functional.scaled_dot_product_attention(q, k, units).mean(1)  # [B, T, L]
    assert (ours[:, 0] == 0).all()
    torch.testing.assert_close(ours[:, 1:], weights[:, :-1])
    assert weights.std() > 0.01, "not uniform"
