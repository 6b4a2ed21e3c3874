"""Which captions and parts of captions count as correct, by hand; the evaluation on a checkpoint."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from encoded import encode
from evaluation import eval_context, make_checkpoint, subject_of
from ranks import run_gloo_ranks

from mug.data.builders.writers import Sample, write_tar_shard
from mug.data.config import DataConfig
from mug.run.evaluators.correct_captions import CorrectCaptions, CorrectCaptionsConfig, found, words
from mug.run.evaluators.evaluator import Result
from mug.run.state.restore import restore


@pytest.mark.parametrize(
    ("phrases", "written", "hits"),
    [
        (["cake", "owl"], "an owl above a cake", [True, True]),  # in any order
        (["cake", "owl"], "a pancake above an owl", [False, True]),  # whole words
        (["owl", "owl"], "an owl above a cake", [True, False]),  # each as often as it is written
        (["owl", "owl"], "owl owl", [True, True]),
        (["left of"], "a left cake of an owl", [False]),  # all words of a phrase, next to each other
        (["left of"], "A cake LEFT OF, an owl", [True]),
        (["fußball", "maçã vermelha"], "Fußball , maçã vermelha", [True, True]),
        ([], "an owl", []),
    ],
)
def test_parts_are_found(phrases, written, hits):
    assert found(phrases, written) == hits


def test_case_and_punctuation_do_not_count():
    assert words("A cake, above an OWL.") == words("a cake above an owl") == "a cake above an owl"
    assert words("a cake above an owl") != words("an owl above a cake")


def sample(number: int, caption: str, parts: dict) -> Sample:
    """An image that depends on the number alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    return Sample(f"{number}", encode(pixels), "png", caption, {"parts": {"en": parts}} if parts else {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("correct") / "run"
    make_checkpoint(run)
    return run


def evaluate(run, samples: list[Sample], folder, **options) -> Result:
    folder.mkdir()
    write_tar_shard(folder / "pairs.tar", samples)
    model, tokenizer, _ = restore(run, lambda line: None)
    context = eval_context(run, pairs=DataConfig(), tokenizer=tokenizer, **options)
    evaluator = CorrectCaptions(CorrectCaptionsConfig(shards=f"{folder}/pairs.tar"), context)
    evaluator.check(model)
    return evaluator.run(subject_of(model))


@pytest.mark.usefixtures("one_rank")
def test_shares_of_what_a_model_writes(run, tmp_path):
    """True captions and parts are made of what the model was seen to write, so the shares are known."""
    blind = evaluate(run, [sample(n, "never written", {"nouns": ["never"]}) for n in range(20)], tmp_path / "a")
    assert blind.metrics["correct/captions"] == blind.metrics["correct/nouns"] == 0
    with_words = [row for row in blind.captions if words(row["written"])][:4]  # an untrained model writes anything
    numbers, written = [int(row["key"]) for row in with_words], [row["written"] for row in with_words]
    first = [words(text).split()[0] for text in written]
    seeing = evaluate(
        run,
        [
            sample(numbers[0], written[0].upper(), {"nouns": [first[0], "never"], "relations": []}),
            sample(numbers[1], written[1], {"nouns": [first[1]], "relations": ["nowhere"]}),
            sample(numbers[2], "never written", {"nouns": ["never"], "relations": [first[2]]}),
            sample(numbers[3], f"{written[3]} and more", {}),
        ],
        tmp_path / "b",
        micro_batch=3,
    )
    assert [row["written"] for row in seeing.captions] == written
    shares = {"captions": 2 / 4, "nouns": 2 / 4, "relations": 1 / 2}
    assert {kind: seeing.metrics[f"correct/{kind}"] for kind in shares} == shares
    assert {f"correct from the visible patches/{kind}" for kind in shares} < set(seeing.metrics)
    (record,) = seeing.records
    assert record["method"] == "correct captions" and record["images"] == 4 and record["correct/nouns"] == 0.5


def write_shares(run, folder) -> None:
    samples = [sample(number, "red", {"nouns": ["red"] * number}) for number in range(5)]
    rank = dist.get_rank()
    found = evaluate(run, samples, folder / f"{dist.get_world_size()}-{rank}", micro_batch=2)
    (folder / f"{dist.get_world_size()}-{rank}.json").write_text(json.dumps([found.metrics, found.captions]), "utf-8")


def test_ranks_find_together_what_one_finds(run, tmp_path):
    for world in (1, 3):
        run_gloo_ranks(world, write_shares, run, tmp_path)
    texts = [path.read_text("utf-8") for path in tmp_path.glob("*.json")]
    assert len(texts) == 4 and len(set(texts)) == 1
    metrics, captions = json.loads(texts[0])
    assert [row["key"] for row in captions] == list("01234") and "correct/nouns" in metrics


@pytest.mark.usefixtures("one_rank")
def test_captions_of_the_visible_patches_are_of_these_alone(run):
    model, _, _ = restore(run, lambda line: None)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    position = torch.arange(6)
    _, masked = model.mask(position)
    changed = images.clone()
    for image, patches in zip(changed, masked.tolist(), strict=True):
        for patch in patches:
            row, column = 8 * (patch // 2), 8 * (patch % 2)
            image[:, row : row + 8, column : column + 8] = 0
    assert torch.equal(model.caption_visible(images, position), model.caption_visible(changed, position))
    assert not torch.equal(model.caption(images), model.caption(changed))


def test_a_run_without_held_out_pairs_has_no_shares(run):
    model, tokenizer, _ = restore(run, lambda line: None)
    evaluator = CorrectCaptions(CorrectCaptionsConfig(), eval_context(run, tokenizer=tokenizer))
    assert evaluator.run(subject_of(model)).metrics == {}
