"""UniX²: every loss and gradient against its formula in float64, the texts of its tasks, and mBART's outputs."""

import pytest
import torch
import unix2 as oracle
from noise import noisy
from plain import encode, parameters
from torch import Tensor
from unix2 import KINDS, VOCABULARY, batch_at, make

from mug.data.kinds.samples import Batch
from mug.model import texts
from mug.model.captioning import masked_language
from mug.model.keyed_random import MISMATCH, SPLIT, random_bits
from mug.model.multilingual import MultilingualConfig
from mug.model.objectives.objective import (
    CaptionsInLanguages,
    Context,
    EmbedsPairs,
    EmbedsSentences,
    ObjectiveError,
    Translates,
)
from mug.model.objectives.unix2 import TASKS, UniX2
from mug.model.presets import ModelConfigError, Vocabulary, resolve

POSITIONS = [1, 2, 3, 5, 6, 7, 8, 9, 12, 14]
SEED = 3


def tokens_of(row: Tensor) -> list[int]:
    return [int(token) for token in row if token != 0]


def prefix_of(position: int, words: int) -> int:
    return int(random_bits(SEED, SPLIT, torch.tensor([position]), 1)) % 2 * (words // 5)


def cut_in_two(source: list[int], position: int) -> tuple[list[int], list[int]]:
    """(prefix as a source, suffix as a target) of BOS X EOS LANGUAGE."""
    (bos, *inner), (eos, language) = source[:-2], source[-2:]
    n = prefix_of(position, len(inner))
    return [bos, *inner[:n], eos, language], [language, *inner[n:], eos]


def hidden_of(source: Tensor, position: int) -> tuple[list[int], dict[int, int]]:
    """(text with hidden words, what they were)."""
    task = masked_language(source[None], torch.tensor([position]), VOCABULARY, SEED)
    inputs = task.inputs[0][: len(tokens_of(source))].tolist()
    inputs = [token or VOCABULARY.mask for token in inputs]  # PAD, drawn as a random word
    return inputs, {t: int(token) for t, token in enumerate(task.targets[0]) if token != 0}


def mean(terms: list[tuple[Tensor, int]]) -> Tensor:
    return sum(total for total, _ in terms) / sum(count for _, count in terms)


def expected_losses(model: UniX2, p: dict[str, Tensor], batch) -> dict[str, Tensor]:
    samples = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["position"]))]
    found = {"pairs": of_pairs, "bitext": of_bitext, "text": of_text, "image_bitext": of_image_bitext}[batch.kind]
    return found(model, p, samples)


def of_pairs(model, p, samples) -> dict[str, Tensor]:
    samples = [sample for sample in samples if sample["tokens"][0]]
    positions = sorted(int(sample["position"]) for sample in samples)
    text_at = {int(sample["position"]): tokens_of(sample["tokens"]) for sample in samples}
    images, cls, match, masked, written = [], [], [], [], []
    for sample in samples:
        position, image = int(sample["position"]), encode(p, model, sample["image"])
        own = text_at[position]
        images.append(p["image_projection.weight"] @ image[0])
        cls.append(p["text_projection.weight"] @ oracle.read(p, torch.tensor(own))[0])
        swaps, step = random_bits(SEED, MISMATCH, torch.tensor([position]), 2)[0].tolist()
        place = (positions.index(position) + 1 + step % (len(positions) - 1)) % len(positions)
        text = text_at[positions[place]] if swaps % 2 else own
        s = oracle.fuse(p, image, oracle.read(p, torch.tensor(text)))[0]
        y = (p["match_head.weight"] @ s + p["match_head.bias"]).squeeze()
        match.append((-(y if text == own else -y).sigmoid().log(), 1))
        hidden, truth = hidden_of(sample["tokens"], position)
        x = oracle.fuse(p, image, oracle.read(p, torch.tensor(hidden)))
        masked.append(oracle.masked_loss(p, x, 1 + len(image), truth))
        prefix, suffix = cut_in_two(own, position)
        written.append(oracle.write_loss(p, suffix, oracle.fuse(p, image, oracle.read(p, torch.tensor(prefix)))))
    cmcl = oracle.contrast(torch.stack(images), torch.stack(cls), p["pair_scale.log_scale"])
    return {"cmcl": cmcl, "itm": mean(match), "mlm": mean(masked), "vplm": mean(written)}


def of_bitext(model, p, samples) -> dict[str, Tensor]:
    sides, written = ([], []), []
    for sample in samples:
        source, target = tokens_of(sample["source"]), tokens_of(sample["target"])
        if source and target:
            read = oracle.read(p, torch.tensor(source))
            reversed_roles = [1, *target[1:], target[0]]
            other = oracle.read(p, torch.tensor(reversed_roles))
            for side, states in zip(sides, (read, other), strict=True):
                side.append(p["sentence_projection.weight"] @ states[0])
            written.append(oracle.write_loss(p, target, oracle.fuse(p, None, read)))
    clcl = oracle.contrast(*(torch.stack(side) for side in sides), p["sentence_scale.log_scale"])
    return {"clcl": clcl, "mt": mean(written)}


def of_text(model, p, samples) -> dict[str, Tensor]:
    masked, written = [], []
    for sample in samples:
        if own := tokens_of(sample["tokens"]):
            hidden, truth = hidden_of(sample["tokens"], int(sample["position"]))
            masked.append(oracle.masked_loss(p, oracle.fuse(p, None, oracle.read(p, torch.tensor(hidden))), 1, truth))
            prefix, suffix = cut_in_two(own, int(sample["position"]))
            written.append(oracle.write_loss(p, suffix, oracle.fuse(p, None, oracle.read(p, torch.tensor(prefix)))))
    return {"mlm": mean(masked), "plm": mean(written)}


def of_image_bitext(model, p, samples) -> dict[str, Tensor]:
    masked, written = [], []
    for sample in samples:
        target = tokens_of(sample["target"])
        if tokens_of(sample["source"]):
            hidden, truth = hidden_of(sample["source"], int(sample["position"]))
            image = encode(p, model, sample["image"])
            x = oracle.fuse(p, image, oracle.read(p, torch.tensor(hidden)))
            masked.append(oracle.masked_loss(p, x, 1 + len(image), truth))
            if target:
                written.append(oracle.write_loss(p, target, x))
    return {"mmmt": mean(written), "mmmt_mlm": mean(masked)}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_every_gradient_are_the_formulae(kind):
    model, batch = noisy(make()), batch_at(kind, POSITIONS)
    p = parameters(model)
    expected, (losses, metrics) = expected_losses(model, p, batch), model(batch)
    assert losses.keys() == expected.keys() == model.counts(batch).keys()
    assert metrics.keys() == {f"accuracy/{name}" for name in losses}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (p[name].grad is None), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", ["pairs", "bitext"])
def test_contrast_and_its_gradients_are_open_clips(kind):
    """Which means over both directions, where equation 1 sums."""
    from open_clip.loss import ClipLoss

    name = TASKS[kind].contrast
    model, batch = noisy(make((name,))), batch_at(kind, [2, 3, 4, 7, 8, 9])
    loss = model(batch)[0][name]
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    if kind == "pairs":
        sides, scale = (model.embed_image(batch["image"]), model.embed_text(batch["tokens"])), model.pair_scale()
    else:
        target = texts.as_source(batch["target"], VOCABULARY)
        sides, scale = map(model.embed_sentence, (batch["source"], target)), model.sentence_scale()
    expected = 2 * ClipLoss()(*sides, scale)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=name)


def test_every_parameter_learns_from_some_kind():
    model = make()
    for kind in KINDS:
        sum(model(batch_at(kind, POSITIONS))[0].values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_the_prefix_is_empty_or_a_fifth_of_the_words():
    words = torch.arange(6, 17)  # 11, of which 2 go to the prefix
    source = torch.tensor([[1, *words, 2, 5, 0]]).expand(64, -1)
    prefix, suffix = texts.split_prefix(source, torch.arange(64), VOCABULARY, SEED)
    none, fifth = [1, 2, 5], [1, 6, 7, 2, 5]
    found = [tokens_of(row) for row in prefix]
    assert all(one in (none, fifth) for one in found) and 20 < found.count(none) < 44
    for one, row in zip(found, suffix, strict=True):
        assert tokens_of(row) == [5, *words[len(one) - 3 :].tolist(), 2]


def test_sources_and_targets_are_each_others():
    source = torch.tensor([[1, 7, 8, 2, 5, 0], [0, 0, 0, 0, 0, 0], [1, 7, 8, 9, 2, 4]])
    target = torch.tensor([[5, 7, 8, 2, 0, 0], [0, 0, 0, 0, 0, 0], [4, 7, 8, 9, 2, 0]])
    assert torch.equal(texts.as_target(source, VOCABULARY), target)
    assert torch.equal(texts.as_source(target, VOCABULARY)[:, :6], source)
    plain = Vocabulary(30, pad=0, bos=1, eos=2, mask=3)
    assert torch.equal(texts.as_target(source, plain), source)


def test_half_of_the_texts_are_anothers_whatever_the_order_of_the_group():
    words = torch.arange(6, 206)
    group, positions = torch.stack([torch.ones(200, dtype=torch.int64), words], 1), torch.arange(200) * 7 + 3
    group[::10] = 0
    mixed = texts.mismatched(group, positions, group, positions, 0, SEED)
    captioned, matched = group[:, 0] != 0, (mixed == group).all(1)
    assert matched[~captioned].all()
    assert 0.35 < matched[captioned].float().mean() < 0.65
    drawn = mixed[captioned & ~matched]
    assert (drawn[:, 0] == 1).all() and len(drawn[:, 1].unique()) > 50
    order = torch.randperm(200, generator=torch.manual_seed(0))
    again = texts.mismatched(group[:50], positions[:50], group[order], positions[order], 0, SEED)
    assert torch.equal(again, mixed[:50])


def test_a_text_equal_to_its_own_is_matched_and_none_is_no_error():
    same = torch.tensor([[1, 7, 2]]).expand(8, -1)
    assert torch.equal(texts.mismatched(same, torch.arange(8), same, torch.arange(8), 0, SEED), same)
    none = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(texts.mismatched(none, torch.arange(2), none, torch.arange(2), 0, SEED), none)


def test_hard_negatives_are_drawn_by_the_softmax_of_the_others():
    """Of 4 texts, two of which are the same: the shares of 4,000 draws, and what is replaced."""
    n, words = 4000, torch.tensor([[1, 7], [1, 8], [1, 7], [1, 9]])
    position, group_position = torch.arange(n), torch.tensor([0, n, n + 1, n + 2])
    logits = torch.tensor([[9.0, 0.0, 9.0, 1.0]]).expand(n, -1)  # the sample's own text is by far the nearest
    own = words[:1].expand(n, -1)
    drawn = texts.hard_negatives(logits, own, position, words, group_position, 0, SEED)
    swapped = random_bits(SEED, MISMATCH, position, 2)[:, 0] % 2 == 1
    assert torch.equal((drawn != own).any(1), swapped), "the half that is replaced at random, too"
    found = drawn[(drawn != own).any(1), 1]
    share = torch.e / (1 + torch.e)
    assert {*found.tolist()} == {8, 9}
    assert (found == 9).double().mean().item() == pytest.approx(
        share, abs=4 * (share * (1 - share) / len(found)) ** 0.5
    )
    order = torch.tensor([2, 0, 3, 1])
    turned = texts.hard_negatives(logits[:, order], own, position, words[order], group_position[order], 0, SEED)
    assert torch.equal(turned, drawn)


def test_hard_negatives_of_texts_that_are_none_or_all_the_same():
    for group in (torch.tensor([[1, 7, 2]]).expand(8, -1), torch.zeros(8, 3, dtype=torch.int64)):
        drawn = texts.hard_negatives(torch.zeros(8, 8), group, torch.arange(8), group, torch.arange(8), 0, SEED)
        assert torch.equal(drawn, group)


def test_hard_negatives_need_the_similarities_of_cmcl():
    config = resolve(MultilingualConfig(**oracle.SIZES, itm_negatives="hard"))
    with pytest.raises(ModelConfigError, match=r"itm_negatives hard needs CMCL: give loss_weights\.cmcl"):
        UniX2(config, Context(vocabulary=VOCABULARY, losses=("itm", "mlm")))
    UniX2(config, Context(vocabulary=VOCABULARY, losses=("mlm",)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_texts_has_losses_of_zero(kind):
    model, batch = make(), batch_at(kind, [5, 10])
    losses, _ = model(batch)
    assert losses.keys() == model.counts(batch).keys()
    assert {*model.counts(batch).values()} == {0} and all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("name, kind", [(name, kind) for kind in KINDS for name in (*TASKS[kind], "itm") if name])
def test_a_loss_alone_is_as_among_others(name, kind):
    batch = batch_at(kind, POSITIONS)
    whole, model = make(), make((name,))
    if name == "itm" and kind != "pairs":
        with pytest.raises(ObjectiveError, match=f"no loss of {kind} data has a weight"):
            model(batch)
        return
    losses, _ = model(batch)
    assert losses.keys() == model.counts(batch).keys() == {name}
    torch.testing.assert_close(losses[name], whole(batch)[0][name])
    assert 0 < model.flops(batch) < whole.flops(batch)


@torch.no_grad()
@pytest.mark.parametrize("languages", [True, False])
def test_captions_are_written_as_they_were_learned(languages):
    """From the image and an empty text of the language; the words have the highest logits, all read at once."""
    model = noisy(make())
    if not languages:
        model.context = Context(seed=SEED, vocabulary=Vocabulary(30, pad=0, bos=1, eos=2, mask=3))
    assert isinstance(model, CaptionsInLanguages) and isinstance(model, EmbedsPairs)
    image, p = batch_at("pairs", [1, 2, 3])["image"], parameters(model)
    first = [4, 5] if languages else [1, 1]
    for language in (0, 1):
        for row, pixels in zip(model.caption(image, language=language), image, strict=True):
            empty = torch.tensor([1, 2, first[language]] if languages else [1, 2])
            memory = oracle.fuse(p, encode(p, model, pixels), oracle.read(p, empty))
            written = tokens_of(row)
            x = oracle.words(p, "decoder", torch.tensor([first[language], *written[1:-1]]))
            x = oracle.norm(p, "decoder.norm", oracle.block(p, "decoder.blocks.0", x, True, memory))
            logits = x @ p["head.weight"].T
            logits[:, [0, first[language]]] = -torch.inf  # never written
            assert written[0] == 1 and written[1:] == logits.argmax(1).tolist()
    assert model.caption(image, beams=3).shape == (3, 14)


@torch.no_grad()
@pytest.mark.parametrize("images", [True, False])
def test_translations_of_any_length_are_those_of_each_alone(images):
    """The decoder sees an own text, and no padding; the words have the highest logits, all read at once."""
    model, batch = noisy(make()), batch_at("image_bitext", [1, 2, 3, 4])
    assert isinstance(model, Translates) and model.languages() == ("en", "de")
    p, image = parameters(model), batch["image"] if images else None
    lengths = [len(tokens_of(row)) for row in batch["source"]]
    assert len(set(lengths)) > 2
    translated = model.translate(batch["source"], 1, image_BCHW=image)
    for i, row in enumerate(translated):
        pixels = encode(p, model, batch["image"][i]) if images else None
        memory = oracle.fuse(p, pixels, oracle.read(p, batch["source"][i, : lengths[i]]))
        written = tokens_of(row)
        x = oracle.words(p, "decoder", torch.tensor([5, *written[1:-1]]))
        logits = oracle.norm(p, "decoder.norm", oracle.block(p, "decoder.blocks.0", x, True, memory))
        logits = logits @ p["head.weight"].T
        logits[:, [0, 5]] = -torch.inf
        assert written[0] == 1 and written[1:] == logits.argmax(1).tolist()
        for beams in (1, 3):
            alone = model.translate(
                batch["source"][i : i + 1, : lengths[i]], 1, beams, None if image is None else image[i : i + 1]
            )
            assert torch.equal(model.translate(batch["source"], 1, beams, image)[i], alone[0])


def test_a_model_without_translation_says_so():
    with pytest.raises(ObjectiveError, match=r"never learned to translate: its loss_weights.mt and loss_weights.mmmt"):
        make(("cmcl", "vplm")).check_translations()
    make(("mmmt",)).check_translations()


@torch.no_grad()
def test_sentences_are_embedded_as_their_loss_does():
    model, batch = noisy(make()), batch_at("bitext", [2, 3, 4])
    assert isinstance(model, EmbedsSentences)
    features, _ = model.features(batch)
    torch.testing.assert_close(model.embed_sentence(batch["source"]), features["source"])
    target = texts.as_source(batch["target"], VOCABULARY)
    torch.testing.assert_close(model.embed_sentence(target), features["target"])
    without = noisy(make(("cmcl",)))
    assert torch.equal(without.embed_sentence(batch["source"]), without.embed_text(batch["source"]))


@torch.no_grad()
def test_embeddings_are_those_of_the_first_states():
    model, batch = noisy(make()), batch_at("pairs", [1, 2, 3])
    features, _ = model.features(batch)
    assert torch.equal(model.embed_image(batch["image"]), features["image"])
    torch.testing.assert_close(model.embed_text(batch["tokens"]), features["text"])


def test_base_has_the_parameters_of_a_vit_base_and_mbart():
    vocabulary = Vocabulary(250_027, pad=1, bos=0, eos=2, mask=250_026, languages=("en",), language_ids=(250_004,))
    with torch.device("meta"):
        model = UniX2(resolve(MultilingualConfig("base")), Context(vocabulary=vocabulary))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    expected = {"encoder": 85.8, "head": 256.0, "text_encoder": 256.0 + 151.5, "decoder": 256.0 + 201.8}
    assert {name: millions[name] for name in expected} == pytest.approx(expected, abs=0.4)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(846, abs=4)


def test_flops_of_a_base_model_are_those_of_the_parts():
    """Of 20 tokens, 197 states of an image: layers of 12·D² and of attention, three sequences that are fused."""
    vocabulary = Vocabulary(1000, pad=0, bos=1, eos=2, mask=3)
    with torch.device("meta"):
        model = UniX2(resolve(MultilingualConfig("base")), Context(vocabulary=vocabulary, losses=("itm",)))
    batch = Batch("pairs", {"tokens": torch.tensor([[1, *range(10, 28), 2]] * 2), "position": torch.arange(2)})
    D, T, F = 1024, 20, 1 + 197 + 20
    layers = 12 * sum(12 * D**2 * n + 2 * n**2 * D for n in (T, F))
    vit = 196 * 768 * 768 + 12 * (12 * 768**2 * 197 + 2 * 197**2 * 768)
    assert model.flops(batch) / 2 == pytest.approx(6 * (layers + vit + 197 * 768 * D), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near(kind):
    model, batch = noisy(make()), batch_at(kind, POSITIONS)
    expected = {name: loss.item() for name, loss in model(batch)[0].items()}
    losses, _ = model.bfloat16()(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=3e-2)
    sum(losses.values()).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_what_its_losses_are_to_find(kind):
    model, batch = make(), batch_at(kind, POSITIONS)
    targets, counts = model.targets(batch), model.counts(batch)
    tasks = TASKS[kind]
    assert targets.keys() == counts.keys() - {tasks.contrast}
    assert {name: len(target) for name, target in targets.items()} == {name: counts[name] for name in targets}
    prepared = model.prepare(batch)
    if tasks.masked:
        assert targets[tasks.masked].equal(prepared["masked_targets"])
    written = [tokens_of(row)[1:] for row in prepared["written"]]
    assert targets[tasks.written].tolist() == [token for row in written for token in row]


def test_chance_is_the_contrast_of_equal_embeddings():
    model = make()
    same = torch.nn.functional.normalize(torch.ones(6, 8), dim=1)
    for first, second in (("image", "text"), ("source", "target")):
        features = {first: same, second: same, "valid": torch.tensor([True] * 5 + [False])}
        ((name, loss),) = model.coupled_losses(features)[0].items()
        assert loss.item() == pytest.approx(model.chance(5)[name], abs=1e-5)
