"""Evaluations of toy objectives, on one rank and shared by three, against plain loops and scikit-learn."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation import eval_context, mug_config, subject_of
from PIL import Image
from ranks import found_by_ranks
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn.functional import normalize

from mug.data.builders.tokenizer_training import train_tokenizer
from mug.data.builders.writers import Sample, write_tar_shard
from mug.data.config import DataConfig
from mug.data.kinds.samples import Batch
from mug.data.labelled_sources import open_folder
from mug.data.order import spread
from mug.data.tokenizer import Tokenizer
from mug.model.encoder import Encoder
from mug.model.objectives.objective import Context, CoupledObjective, Objective
from mug.model.presets import resolve
from mug.model.vit import init_weights
from mug.run.common.errors import RunError
from mug.run.evaluators import zero_shot
from mug.run.evaluators.evaluator import Evaluator, evaluator_names, find_evaluator
from mug.run.evaluators.features import untrained_encoder
from mug.run.evaluators.held_out_pairs import PairReader
from mug.run.evaluators.knn import TEMPERATURE, KNNConfig, NearestNeighbours, predict
from mug.run.evaluators.linear_probe import LinearProbe, LinearProbeConfig, ProbeConfig, train_probe
from mug.run.evaluators.losses import HeldOutLosses, LossesConfig
from mug.run.evaluators.retrieval import Retrieval, RetrievalConfig, places
from mug.run.evaluators.zero_shot import ZeroShot, ZeroShotConfig, class_names
from mug.run.training.loop import due_evaluations

COLOURS = {"dull_red": (120, 90, 90), "green": (90, 120, 90), "blue": (90, 90, 120)}
WORDS = "red green blue square photo of a bright dark one two three four five six seven"


class Embeds(Objective):
    """Embeds images by the encoder, and captions by a table."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.encoder = Encoder(config).apply(init_weights)
        self.table = nn.Embedding(600, config.width)

    def embed_image(self, image_BCHW):
        return normalize(self.encoder(image_BCHW)[:, 1:].mean(1), dim=1)

    def embed_text(self, tokens_BT):
        return normalize(self.table(tokens_BT).mean(1), dim=1)


class Coupled(CoupledObjective):
    """`far` is each sample's distance from the mean of its group, `own` its value."""

    losses = {"far": 1.0, "own": 2.0}  # noqa: RUF012

    def counts(self, batch):
        return {"far": len(batch["value"]), "own": len(batch["value"])}

    def features(self, batch):
        return {"value": batch["value"]}, None

    def coupled_losses(self, features):
        whole = gather_all(features["value"])
        far = (features["value"] - whole.mean()).abs().mean()
        return {"far": far}, {"accuracy/far": (features["value"] > whole.mean()).float().mean()}

    def own_losses(self, batch, rest):
        return {"own": batch["value"].mean()}, {}


def gather_all(value_n):
    import torch.distributed as dist

    parts = [torch.empty_like(value_n) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value_n.contiguous())
    return torch.cat(parts)


@dataclass
class Squares:
    """Samples whose value is the square of their number."""

    count: int

    def __len__(self):
        return self.count

    def batch(self, positions):
        return Batch("pairs", {"value": torch.tensor([float(p * p) for p in positions])}), []


def toy(seed: int = 0) -> Embeds:
    torch.manual_seed(seed)
    return Embeds(resolve(mug_config(width=32)), Context()).eval()


def write_labelled(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 20)):
        for label, colour in COLOURS.items():
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 40, (1, 1, 3)) + random.normal(0, 5, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{number}.png")


def write_pairs(folder: Path) -> None:
    """23 pairs of one to three captions; number 4 has none, and number 9 is no image."""
    random, words, samples = np.random.default_rng(1), WORDS.split(), []
    for i in range(23):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "image.png")
        texts = [" ".join(random.choice(words, 5)) for _ in range(1 + i % 3)]
        data = b"no image" if i == 9 else (folder / "image.png").read_bytes()
        meta = {"captions": {"en": texts[1:]}} if len(texts) > 1 else {}
        samples.append(Sample(f"key{i:02}", data, "png", "" if i == 4 else texts[0], {} if i == 4 else meta))
    write_tar_shard(folder / "pairs.tar", samples)
    (folder / "tokenizer.json").write_text(train_tokenizer([WORDS] * 3, 512).to_str(), encoding="utf-8")


def work(folder: Path) -> dict:
    """Returns what all evaluations find."""
    context = eval_context(
        folder,
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        pairs=DataConfig(shards="x", held_out=str(folder / "pairs.tar"), cache=str(folder / "cache")),
        open_held_out=lambda: {"": Squares(31)},
        loss_weights=Coupled.losses,
        micro_batch=2,
        group=12,
    )
    data = str(folder / "images")
    evaluators = {
        "knn": NearestNeighbours(KNNConfig(data=data, k=(5, 20)), context),
        "probe": LinearProbe(LinearProbeConfig(data=data, seeds=2, epochs=2), context),
        "zero shot": ZeroShot(ZeroShotConfig(data=f"{data}/val", templates=("a {}", "photo of {}")), context),
        "retrieval": Retrieval(RetrievalConfig(), context),
    }
    found = {name: evaluator.run(subject_of(toy())) for name, evaluator in evaluators.items()}
    found["losses"] = HeldOutLosses(LossesConfig(), context).run(subject_of(Coupled(None, Context())))
    return {name: {"metrics": one.metrics, "records": one.records} for name, one in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluators")
    write_labelled(folder / "images")
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 3])
def found(request, folder) -> dict[str, dict]:
    """What is found by one rank, and by three."""
    return found_by_ranks(request.param, work, folder)


def features(folder: Path, encoder: nn.Module) -> tuple[torch.Tensor, list[str]]:
    source = open_folder(folder)
    with torch.inference_mode():
        tokens = encoder(torch.stack([torch.from_numpy(source.view(i, 16)) for i in range(len(source))]))
    return tokens, source.labels


def test_neighbours_are_scikit_learns(found, folder):
    for name, feature in (("mean of patches", lambda x: x[:, 1:].mean(1)), ("class token", lambda x: x[:, 0])):
        (train, labels), (test, true) = (
            features(folder / "images" / split, toy().encoder) for split in ("train", "val")
        )
        weights = {"metric": "cosine", "algorithm": "brute", "weights": lambda d: np.exp(-d / TEMPERATURE)}
        for k in (5, 20):
            expected = KNeighborsClassifier(k, **weights).fit(feature(train), labels).score(feature(test), true)
            accuracy = found["knn"]["metrics"][f"accuracy/knn, {name}, k = {k}"]
            assert 0.4 < expected < 0.99 and accuracy == pytest.approx(expected, abs=1.5 / 60)
    record = found["knn"]["records"][0]
    assert record["method"] == "kNN" and record["encoder"] == f"{folder.name}, step 3" and record["test_images"] == 60


def test_the_spread_of_neighbours_features_is_that_of_their_covariance(found, folder):
    test, _ = features(folder / "images" / "val", toy().encoder)
    for record in found["knn"]["records"]:
        x = (test[:, 1:].mean(1) if record["feature"] == "mean of patches" else test[:, 0]).double().numpy()
        covariance = np.cov((x / np.linalg.norm(x, axis=1, keepdims=True)).T, bias=True)
        eigenvalues = np.linalg.eigvalsh(covariance)
        assert record["std"] == pytest.approx(np.sqrt(np.diag(covariance)).mean() * x.shape[1] ** 0.5, rel=1e-3)
        assert record["rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-3)


def test_probes_of_each_seed_are_those_of_the_protocol(found, folder):
    (train, labels), (test, true) = (features(folder / "images" / split, toy().encoder) for split in ("train", "val"))
    names = sorted(COLOURS)
    labels, true = (torch.tensor([names.index(one) for one in many]) for many in (labels, true))
    (record,) = (one for one in found["probe"]["records"] if one["feature"] == "class token")
    for seed, value in enumerate(record["values"]):
        probe = train_probe(train[:, 0].clone(), labels, 3, ProbeConfig(epochs=2), seed)
        with torch.inference_mode():
            assert value == pytest.approx((probe(test[:, 0]).argmax(1) == true).double().mean().item(), abs=1.5 / 60)


def test_zero_shot_is_a_plain_loop(found, folder):
    objective, tokenizer = toy(), Tokenizer.load(folder / "tokenizer.json")
    with torch.inference_mode():
        classes = {}
        for label in COLOURS:
            name = label.replace("_", " ")
            texts = [tokenizer.encode(text, 8) for text in (f"a {name}", f"photo of {name}")]
            classes[label] = objective.embed_text(torch.from_numpy(np.stack(texts))).mean(0)
            classes[label] = classes[label] / classes[label].norm()
        source, hits = open_folder(folder / "images" / "val"), 0
        for i, label in enumerate(source.labels):
            (image,) = objective.embed_image(torch.from_numpy(source.view(i, 16))[None])
            hits += max(classes, key=lambda one: float(image @ classes[one])) == label
    assert found["zero shot"]["metrics"] == {"accuracy/zero shot": pytest.approx(hits / 60)}
    assert hits not in (0, 60)


def test_recall_is_a_plain_loop_over_queries(found, folder):
    objective, tokenizer = toy(), Tokenizer.load(folder / "tokenizer.json")
    data = DataConfig(shards=str(folder / "pairs.tar"), cache=str(folder / "cache"))
    reader = PairReader.open(data, 100)
    pairs = [pair for pair in reader.read(range(len(reader)), 16) if pair.captions]
    assert len(pairs) == 21 and [pair.number for pair in pairs[4:6]] == [5, 6] and "key09" in reader.left_out[0]
    with torch.inference_mode():
        images = [objective.embed_image(torch.from_numpy(pair.image)[None])[0] for pair in pairs]
        texts = [
            (i, objective.embed_text(torch.from_numpy(tokenizer.encode(caption, 8))[None])[0])
            for i, pair in enumerate(pairs)
            for caption in pair.captions
        ]
    assert len(texts) > 35
    for k in (1, 5, 10):
        by_text = 0
        for owner, text in texts:
            nearest = sorted(range(len(images)), key=lambda i: -float(images[i] @ text))
            by_text += owner in nearest[:k]
        by_image = 0
        for i, image in enumerate(images):
            nearest = sorted(texts, key=lambda one: -float(one[1] @ image))
            by_image += i in [owner for owner, _ in nearest[:k]]
        metrics = found["retrieval"]["metrics"]
        assert metrics[f"recall@{k}/text to image"] == pytest.approx(by_text / len(texts))
        assert metrics[f"recall@{k}/image to text"] == pytest.approx(by_image / len(images))
    assert found["retrieval"]["records"][0]["captions"] == len(texts)


def test_coupled_losses_are_of_entire_groups(found):
    """31 samples make two groups of 12, spread over the set."""
    values = torch.tensor([float(p * p) for p in spread(31, 24)])
    groups = values.split(12)
    far = torch.cat([(group - group.mean()).abs() for group in groups]).mean().item()
    above = torch.cat([(group > group.mean()).float() for group in groups]).mean().item()
    metrics = found["losses"]["metrics"]
    assert metrics["loss/far"] == pytest.approx(far) and metrics["accuracy/far"] == pytest.approx(above)
    assert metrics["loss/own"] == pytest.approx(values.mean().item())
    assert metrics["loss/total"] == pytest.approx(far + 2 * values.mean().item())


def test_embeddings_that_are_all_the_same_find_nothing():
    same, own = torch.ones(4, 6), torch.eye(4, 6).bool()
    assert places(same, own).tolist() == [5] * 4
    assert zero_shot.hits_among(torch.ones(4, 2), torch.ones(3, 2), torch.tensor([0, 1, 2, 0]), 1) == 0


def test_an_untrained_encoder_is_that_of_its_seed():
    one, again, other = (untrained_encoder(toy(), seed).cls_token for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_classes_may_have_names(folder, tmp_path):
    images, file = open_folder(folder / "images" / "val"), tmp_path / "names.json"
    file.write_text(json.dumps({"dull_red": "brick", "green": "grass", "blue": "sky", "grey": "ash"}), encoding="utf-8")
    names = class_names(ZeroShotConfig(data="x", names=str(file)), images)
    assert names == {"dull_red": "brick", "green": "grass", "blue": "sky", "grey": "ash"}
    for text, said in (
        ('{"green": "grass"}', "no name for class 'blue'"),
        ("[]", "must be a JSON object"),
        ("{", "as JSON"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RunError, match=said):
            class_names(ZeroShotConfig(data="x", names=str(file)), images)


def test_every_evaluation_is_found_by_its_file():
    assert evaluator_names() == [
        *(
            "answers",
            "attentive_probe",
            "captions",
            "correct_captions",
            "floors",
            "information",
            "knn",
            "likelihood_zero_shot",
            "linear_probe",
            "losses",
        ),
        *("pictures", "retrieval", "segmentation", "text_retrieval", "translate", "zero_shot"),
    ]
    for name in evaluator_names():
        assert issubclass(find_evaluator(name), Evaluator)
    with pytest.raises(RunError, match="'knnn' is not one of the evaluations answers, attentive_probe"):
        find_evaluator("knnn")


def test_an_objective_without_the_ability_is_refused(folder):
    evaluator = ZeroShot(ZeroShotConfig(data=str(folder / "images" / "val")), eval_context(folder))
    with pytest.raises(
        RunError, match="evaluation zero_shot needs an objective that embeds images and captions in one"
    ):
        evaluator.check(Coupled(None, Context()))
    evaluator.check(toy())


def test_whole_images_have_no_losses(folder):
    context = eval_context(folder, open_held_out=lambda: {"": Squares(3)})  # batches without a position
    with pytest.raises(RunError, match="are full images, for evaluation segmentation"):
        HeldOutLosses(LossesConfig(), context).check(toy())


def test_a_rank_without_an_image_finds_nothing():
    train_ND, labels_N = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert [len(one) for one in predict(train_ND, labels_N, torch.empty(0, 4), [1, 3]).values()] == [0, 0]
    assert places(torch.empty(0, 6), torch.empty(0, 6, dtype=torch.bool)).tolist() == []
    assert zero_shot.hits_among(torch.empty(0, 4), train_ND, torch.empty(0, dtype=torch.int64), 5) == 0


def test_more_neighbours_than_images_are_refused(folder):
    with pytest.raises(RunError, match="k 20 is more than the 9 training images"):
        NearestNeighbours(KNNConfig(data=str(folder / "images"), max_train=9, k=(20,)), eval_context(folder))
    thinned = NearestNeighbours(
        KNNConfig(data=str(folder / "images"), max_train=9, k=(2,)), eval_context(folder)
    ).images
    assert thinned.train_labels_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(thinned.test) == 60


def test_an_evaluation_that_costs_more_may_be_rarer():
    evaluators = {
        name: SimpleNamespace(config=SimpleNamespace(every=every)) for name, every in (("a", None), ("b", 30))
    }
    recipe = SimpleNamespace(trainer=SimpleNamespace(eval_every=10))
    run = SimpleNamespace(evaluators=evaluators, recipe=recipe, steps=35)
    due = {step: list(due_evaluations(run, step, None)) for step in (5, 10, 30, 35)}
    assert due == {5: [], 10: ["a"], 30: ["a", "b"], 35: ["a", "b"]}
    assert due_evaluations(run, 30, "SIGTERM") == {}
