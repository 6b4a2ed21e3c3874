"""The attentive probe, zero-shot by likelihood, bounds of information, and components of pixels, against oracles."""

import io
import json
import math

import numpy as np
import pytest
import torch
from encoded import encode
from evaluation import eval_context, mug_config, subject_of
from noise import noisy
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, write_shards
from mug.data.tokenizer import Tokenizer
from mug.model.objectives.mae import MAE
from mug.model.objectives.mug import MUG
from mug.model.objectives.objective import Context
from mug.model.presets import resolve
from mug.run.common.errors import RunError
from mug.run.evaluate import process_group
from mug.run.evaluators.attentive_probe import AttentiveHead, AttentiveProbe, AttentiveProbeConfig, train_head
from mug.run.evaluators.features import principal_components
from mug.run.evaluators.information import Information, InformationConfig, lower_bound, scaled_bound
from mug.run.evaluators.likelihood_zero_shot import LikelihoodConfig, LikelihoodZeroShot
from mug.run.training.recipe import vocabulary_of


def test_components_are_scikit_learns():
    random = np.random.default_rng(0)
    train = random.normal(size=(80, 30)) @ random.normal(size=(30, 30))
    test = random.normal(size=(20, 30))
    ours = principal_components(*({"pixels": torch.tensor(x, dtype=torch.float32)} for x in (train, test)), 5)
    oracle = PCA(5, svd_solver="full").fit(train)
    for found, of in zip(ours, (train, test), strict=True):
        expected = oracle.transform(of)
        sign = np.sign((found["components"].numpy() * expected).sum(0))
        np.testing.assert_allclose(found["components"].numpy() * sign, expected, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_attentive_head_is_multi_head_attention(heads):
    """PyTorch's, of one query that is projected by the identity, on normalised tokens."""
    torch.manual_seed(0)
    width, tokens = 16, torch.randn(8, 5, 16) * 3 + 1
    head, oracle = AttentiveHead(width, 3, heads), nn.MultiheadAttention(width, heads, batch_first=True)
    nn.init.normal_(head.query)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([torch.eye(width), head.key.weight, head.value.weight]))
        oracle.in_proj_bias.copy_(torch.cat([torch.zeros(2 * width), head.value.bias]))
        oracle.out_proj.weight.copy_(torch.eye(width))
        oracle.out_proj.bias.zero_()
    flat = tokens.flatten(0, 1)
    x = (tokens - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-6).sqrt()
    collected, _ = oracle(head.query.flatten().expand(8, 1, width), x, x)
    torch.testing.assert_close(head(tokens), head.head(collected[:, 0]), atol=1e-5, rtol=1e-5)


def test_attention_finds_what_the_mean_drowns():
    """One token of nine tells the class, marked by a flag; the others are noise of ten times its size."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (600,), generator=random)
    tokens = 10 * torch.randn(600, 9, 8, generator=random)
    place = torch.randint(9, (600,), generator=random)
    tokens[..., 7] = 0
    tokens[torch.arange(600), place] = torch.cat(
        [(2.0 * labels - 1)[:, None] * torch.ones(600, 7), torch.full((600, 1), 5.0)], 1
    )
    config = AttentiveProbeConfig(data="", epochs=40, learning_rate=2e-2)
    head = train_head(tokens[:400], labels[:400], 2, config, seed=0)
    again = train_head(tokens[:400], labels[:400], 2, config, seed=0)
    assert (head(tokens[400:]).argmax(1) == labels[400:]).double().mean() > 0.95
    assert torch.equal(head.query, again.query), "a seed gives one probe"
    with pytest.raises(RunError, match="encoder pixels has no patch tokens"):
        AttentiveProbeConfig(data="", encoder="pixels").check()


def test_the_bound_of_gaussians_is_below_their_information_and_near_it():
    """x and t correlate by 0.9: I = -ln(1 - 0.81) / 2 = 0.830 nats; the best score is their log density ratio."""
    random, rho = np.random.default_rng(0), 0.9
    bounds = []
    for _ in range(200):
        x = random.normal(size=128)
        t = rho * x + math.sqrt(1 - rho**2) * random.normal(size=128)
        log_p = -((t[None] - rho * x[:, None]) ** 2) / (2 * (1 - rho**2))  # of each t (column) given each x (row)
        bounds.append(lower_bound(torch.tensor(log_p + 7 * t[None])))  # what no image explains cancels
    information = -0.5 * math.log(1 - rho**2)
    assert information - 0.05 < np.mean(bounds) < information + 0.02
    assert lower_bound(torch.zeros(9, 9)) == pytest.approx(0) and lower_bound(100 * torch.eye(9)) == pytest.approx(
        math.log(9)
    )


def test_the_scale_is_not_chosen_on_the_groups_that_count():
    perfect, wrong = torch.eye(4), 1 - torch.eye(4)
    assert scaled_bound([perfect, perfect]) == pytest.approx(math.log(4), abs=1e-6)
    assert scaled_bound([wrong, perfect]) == pytest.approx(lower_bound(perfect)), "scale 1 harms the first group least"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[MUG, Tokenizer]:
    """A small untrained MUG with sharp opinions, and its tokenizer."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["red green blue square of one colour"] * 3, 512).save(str(file))
    tokenizer = Tokenizer.load(file)
    torch.manual_seed(0)
    model = MUG(resolve(mug_config()), Context(0, vocabulary_of(tokenizer)))
    with torch.no_grad():
        model.text_decoder.head.weight.mul_(40)
    return noisy(model).eval(), tokenizer


@torch.inference_mode()
def test_likelihoods_are_a_plain_loop(model):
    model, tokenizer = model
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.from_numpy(np.stack([tokenizer.encode(text, 8) for text in ("red square", "blue", "one green red")]))
    found = model.caption_log_likelihoods(images, tokens)
    for b in range(3):
        for c in range(3):
            total, text = 0.0, [token for token in tokens[c].tolist() if token != tokenizer.pad]
            for t in range(1, len(text)):
                hidden = model.text_decoder(torch.tensor([text[:t]]), model.encoder(images[b : b + 1]))
                total += model.text_decoder.head(hidden)[0, -1].double().log_softmax(0)[text[t]].item()
            assert found[b, c].item() == pytest.approx(total, rel=1e-4)


def write_classes(folder):
    """Six pictures each of three colours, a folder per class, with captions next to them."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, colour in (("red", 0), ("green", 1), ("blue", 2)):
            (folder / split / label).mkdir(parents=True)
            for i in range(6):
                pixels = random.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                pixels[..., colour] += 150
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")


def test_evaluations_run_as_the_command_runs_them(model, tmp_path):
    """Zero-shot takes the class whose caption is the likeliest; the probe tells the colours apart."""
    model, tokenizer = model
    write_classes(tmp_path)
    context = eval_context(tmp_path, tokenizer=tokenizer)
    config = LikelihoodConfig(data=str(tmp_path / "test"), templates=("{} square", "{}"))
    probe = AttentiveProbeConfig(data=str(tmp_path), epochs=30, learning_rate=1e-2, hits=True, probe_batch=6)
    with process_group():
        found = LikelihoodZeroShot(config, context).run(subject_of(model))
        probed = AttentiveProbe(probe, context).run(subject_of(model))
    texts = [template.replace("{}", name) for name in ("blue", "green", "red") for template in config.templates]
    tokens = torch.from_numpy(np.stack([tokenizer.encode(text, 8) for text in texts]))
    rows = []
    for label in ("blue", "green", "red"):
        for i in range(6):
            pixels = np.asarray(Image.open(tmp_path / "test" / label / f"{i}.png")).copy()
            with torch.inference_mode():
                scores = model.caption_log_likelihoods(torch.from_numpy(pixels).permute(2, 0, 1)[None], tokens)
            rows.append(scores.view(3, 2).exp().double().sum(1))
    names, true = torch.stack(rows), torch.arange(3).repeat_interleave(6)
    assert found.metrics == {
        "accuracy/zero shot by likelihood": pytest.approx((names.argmax(1) == true).double().mean().item()),
        "accuracy/zero shot by likelihood of the image": pytest.approx(
            ((names / names.mean(0)).argmax(1) == true).double().mean().item()
        ),
    }
    record = probed.records[0]
    assert record["accuracy"] > 0.8 and record["hits"][0].count("1") == round(18 * record["accuracy"])
    assert json.loads(json.dumps(record))["method"] == "attentive probe"


def test_information_is_a_plain_mean_over_groups(model, tmp_path):
    """Nine pairs in groups of three, one of them without a caption."""
    model, tokenizer = model
    random, colours = np.random.default_rng(1), ("red", "green", "blue")
    samples = []
    for i in range(9):
        picture = encode(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        samples.append(Sample(f"{i}", picture, "png", f"{colours[i % 3]} square" * (i != 4), {}))
    list(write_shards(samples, tmp_path, "pairs-", "tar", 5))
    config = InformationConfig(shards=f"{tmp_path}/pairs-*.tar", candidates=3, limit=9)
    context = eval_context(tmp_path, tokenizer=tokenizer)
    with process_group():
        found = Information(config, context).run(subject_of(model))
    bounds, own_captions = [], []
    for group in ([0, 1, 2], [3, 5], [6, 7, 8]):
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(samples[i].image))) for i in group])
        tokens = torch.from_numpy(np.stack([tokenizer.encode(samples[i].caption, 8) for i in group]))
        with torch.inference_mode():
            score = model.caption_log_likelihoods(torch.from_numpy(pixels).permute(0, 3, 1, 2), tokens).double()
        own = [score[k, k] - score[:, k].logsumexp(0) for k in range(len(group))]
        bounds.append(math.log(len(group)) + sum(own).item() / len(own))
        own_captions += score.diagonal().tolist()
    assert len(own_captions) == 8 and found.metrics == {
        "information/captions": pytest.approx(np.mean(bounds), abs=1e-4),
        "information - H(T)/captions": pytest.approx(np.mean(own_captions), abs=1e-4),
    }
    assert Information.suits(MUG) and not Information.suits(MAE) and AttentiveProbe.suits(MAE)


def test_information_needs_an_ability_and_two_groups(model, tmp_path):
    with pytest.raises(RunError, match="limit 100 must be at least two groups of 64"):
        InformationConfig(limit=100).check()
    evaluator = Information.__new__(Information)
    with pytest.raises(RunError, match="needs an objective that embeds pairs or scores captions"):
        evaluator.check(nn.Linear(1, 1))
    evaluator.check(model[0])
