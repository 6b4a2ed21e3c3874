"""BERT's objective: which words are hidden, what stands there instead, what is to be predicted."""

import pytest
import torch

from mug.model.captioning import masked_language
from mug.model.objectives.mug import MUGConfig
from mug.model.presets import ModelConfigError, Vocabulary, resolve
from mug.model.text_decoder import pack

WORDS = Vocabulary(size=1000, pad=0, bos=1, eos=2, mask=3)
SEED = 11


def captions(B, words, T=None, seed=0):
    """int64 [B, T]: BOS, random words, EOS, PAD."""
    T = words + 2 if T is None else T
    tokens = torch.zeros(B, T, dtype=torch.long)
    tokens[:, 0], tokens[:, words + 1] = WORDS.bos, WORDS.eos
    generator = torch.Generator().manual_seed(seed)
    tokens[:, 1 : words + 1] = torch.randint(4, WORDS.size, (B, words), generator=generator)
    return tokens


def test_15_percent_of_20_words_are_3():
    tokens = captions(500, 20, T=30)
    task = masked_language(tokens, torch.arange(500), WORDS, SEED)
    assert ((task.targets != WORDS.pad).sum(1) == 3).all()


@pytest.mark.parametrize("words, expected", [(0, 0), (1, 1), (2, 1), (6, 1), (40, 6)])
def test_at_least_one_word_of_every_caption_that_has_words(words, expected):
    task = masked_language(captions(50, words, T=50), torch.arange(50), WORDS, SEED)
    assert ((task.targets != WORDS.pad).sum(1) == expected).all()


def test_targets_are_the_true_words_and_the_rest_stays_as_it_is():
    tokens = captions(300, 20, T=30)
    task = masked_language(tokens, torch.arange(300), WORDS, SEED)
    chosen = task.targets != WORDS.pad
    assert torch.equal(task.targets[chosen], tokens[chosen])
    assert torch.equal(task.inputs[~chosen], tokens[~chosen])
    assert not torch.isin(tokens[chosen], torch.tensor([WORDS.pad, WORDS.bos, WORDS.eos])).any()


def test_every_place_is_equally_likely():
    n = 6000
    chosen = masked_language(captions(n, 20), torch.arange(n), WORDS, SEED).targets != WORDS.pad
    counts = chosen[:, 1:21].sum(0).double()
    deviation = (n * 0.15 * 0.85) ** 0.5
    assert (counts - n * 0.15).abs().max() < 4.5 * deviation
    assert chosen[:, [0, 21]].sum() == 0


def test_80_10_10():
    n = 4000
    tokens = captions(n, 20)
    task = masked_language(tokens, torch.arange(n), WORDS, SEED)
    chosen = task.targets != WORDS.pad
    written, true = task.inputs[chosen], tokens[chosen]
    shares = {
        "mask": (written == WORDS.mask).double().mean().item(),
        "same": (written == true).double().mean().item(),
        "random": ((written != true) & (written != WORDS.mask)).double().mean().item(),
    }
    tolerance = 4.5 * (0.8 * 0.2 / len(true)) ** 0.5
    assert shares == pytest.approx({"mask": 0.8, "same": 0.1, "random": 0.1}, abs=tolerance)
    random = written[(written != true) & (written != WORDS.mask)].double()
    assert random.mean().item() == pytest.approx(500, abs=4.5 * 289 / len(random) ** 0.5)


def test_lengths_count_all_but_padding():
    tokens = torch.cat([captions(1, 5, T=12), captions(1, 10, T=12), torch.zeros(1, 12, dtype=torch.long)])
    task = masked_language(tokens, torch.arange(3), WORDS, SEED)
    assert task.lengths_B.tolist() == [7, 12, 0]
    assert task.causal is False
    assert (task.targets[2] == WORDS.pad).all() and torch.equal(task.inputs[2], tokens[2])


def test_it_depends_on_seed_and_position_alone():
    tokens, position = captions(40, 20, T=30), torch.arange(40) * 7
    task = masked_language(tokens, position, WORDS, SEED)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    turned = masked_language(tokens[order], position[order], WORDS, SEED)
    assert torch.equal(turned.inputs, task.inputs[order]) and torch.equal(turned.targets, task.targets[order])
    for b in range(3):
        alone = masked_language(tokens[b : b + 1], position[b : b + 1], WORDS, SEED)
        assert torch.equal(alone.inputs[0], task.inputs[b])
    for other in (masked_language(tokens, position + 1, WORDS, SEED), masked_language(tokens, position, WORDS, 12)):
        assert ((other.targets != task.targets).any(1)).sum() > 35


@torch.inference_mode()
def test_padding_does_not_move_a_logit(make_model, make_batch):
    model = make_model(captioning="masked-language", text_length=12)
    batch = make_batch(model, [4, 7])
    memory = model.encoder(batch["image"])
    lengths = torch.tensor([6, 9])
    packing = pack(lengths, T=12, L=memory.shape[1])
    before = model.text_decoder(batch["tokens"], memory, causal=False, packing=packing).split(lengths.tolist())
    for b, length in enumerate(lengths):
        tokens = batch["tokens"][b : b + 1]
        other = tokens.clone()
        other[:, length:] = 5
        packing = pack(lengths[b : b + 1], T=12, L=memory.shape[1])
        after = model.text_decoder(other, memory[b : b + 1], causal=False, packing=packing)
        torch.testing.assert_close(after, before[b], atol=1e-6, rtol=0)
        short = model.text_decoder(tokens[:, :length], memory[b : b + 1], causal=False)
        torch.testing.assert_close(short[0], before[b], atol=2e-6, rtol=0)


@torch.inference_mode()
def test_both_sides_are_seen(make_model, make_batch):
    model = make_model(captioning="masked-language")
    batch = make_batch(model, [6])
    memory = model.encoder(batch["image"])
    before = model.text_decoder(batch["tokens"], memory, causal=False)
    for t in (1, 6):
        tokens = batch["tokens"].clone()
        tokens[0, t] = 4 + (tokens[0, t] + 1) % 16
        after = model.text_decoder(tokens, memory, causal=False)
        assert ((after - before)[0].abs().amax(-1) > 1e-5).all()


@torch.inference_mode()
def test_loss_is_the_cross_entropy_of_the_hidden_words(make_model, make_batch):
    model = make_model("tiny", captioning="masked-language")
    batch = make_batch(model, [22, 1, 7])
    task = masked_language(batch["tokens"], batch["position"], model.vocabulary, model.seed)
    memory = model.encoder(batch["image"], model.mask(batch["position"])[0])
    terms = []
    for b in range(3):
        length = int(task.lengths_B[b])
        hidden = model.text_decoder(task.inputs[b : b + 1, :length], memory[b : b + 1], causal=False)
        log_p = model.text_decoder.head(hidden)[0].double().log_softmax(-1)
        targets = task.targets[b, :length].tolist()
        terms += [-log_p[t, word].item() for t, word in enumerate(targets) if word != model.vocabulary.pad]
    assert len(terms) == 3 + 1 + 1 == model.counts(batch)["caption"]
    assert model(batch)[0]["caption"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_a_vocabulary_without_mask_token_is_refused(make_model):
    no_mask = Vocabulary(size=20, pad=0, bos=1, eos=2, mask=None)
    with pytest.raises(ModelConfigError, match="masked-language needs a tokenizer with a mask token"):
        make_model(captioning="masked-language", vocabulary=no_mask)
    assert resolve(MUGConfig(captioning="masked-language")).captioning == "masked-language"
    make_model(vocabulary=no_mask)
