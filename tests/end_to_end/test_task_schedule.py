"""UniX², whose steps mix four kinds of batch, killed in the middle of its schedule: ranks and ZeRO stage change; and
what becomes of a finished run whose languages and streams change, and of bad rows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from launch import forks, kill_at_a_row, losses, pretrain, rows, torchrun

from mug.data.builders.openmoji_languages import ensure_languages
from mug.data.config import TextConfig
from mug.data.shares import locate
from mug.run.training.recipe import RECIPES

BATCH, GROUPS, STEPS, SEED = 24, 4, 12, 0
# Ranks, ZeRO stage, samples of a micro-batch, and the row of metrics at which the run is killed.
LEGS = [(1, 1, 2, 6), (2, 2, 3, 14), (3, 3, 1, None)]
KINDS = {"pairs": "cmcl", "bitext": "clcl", "text": "plm", "image_bitext": "mmmt"}  # and a loss that no other has

BAD = {
    "empty": ({"en": "picture", "de": " "}, "a text only in en, of data.language en,de"),
    "long": ({"en": "picture " * 1_300_000, "de": "Bild"}, "10,400,038 bytes are more than 1,048,576"),
    "code": ({"en": "picture", "dx": "Bild"}, "a text only in en, of data.language en,de"),
}


@pytest.fixture(scope="module")
def translations(tmp_path_factory) -> dict[str, str]:
    """The options of a stream of translations, of which some are bad."""
    captions = {f"{i:02d}": {"en": f"picture number {i}", "de": f"Bild Nummer {i}"} for i in range(21)}
    captions |= {key: texts for key, (texts, _) in BAD.items()}
    table = [{"key": key, "json": json.dumps({"captions": texts})} for key, texts in captions.items()]
    path = tmp_path_factory.mktemp("translations") / "shard.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    tokenizer = ensure_languages(TextConfig().cache_folder())
    return {"shards": str(path), "tokenizer": str(tokenizer), "language": "en,de"}


def embedded_recipe() -> dict:
    return yaml.safe_load((RECIPES / "unix2" / "tiny.yaml").read_text(encoding="utf-8"))


def write_recipe(folder, name: str = "recipe", **streams: dict) -> list[str]:
    """The recipe of the embedded default, with a model of a few thousand weights; options that name it."""
    recipe = embedded_recipe()
    recipe["model"] |= {"width": 32, "depth": 1, "heads": 2, "text_width": 32, "text_heads": 2, "embedding_width": 16}
    recipe["model"] |= {"text_layers": 1, "fusion_layers": 1, "decoder_layers": 1}
    recipe["data"] |= {stream: recipe["data"].get(stream, {}) | options for stream, options in streams.items()}
    for stream in recipe["data"].values():
        stream["workers"] = 0
    rate = 1e-3 * BATCH / 256
    recipe["trainer"] |= {"global_batch": BATCH, "groups": GROUPS, "micro_batch": 6, "max_steps": STEPS}
    recipe["trainer"] |= {"base_learning_rate": 1e-3, "min_learning_rate": rate, "warmup_samples": 0}
    recipe["trainer"] |= {"log_every": 1, "eval_samples": 24}
    recipe |= {"evals": {}, "checkpoint": {"every_steps": 1, "keep": 2}, "seed": SEED}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, translations) -> list[str]:
    return write_recipe(tmp_path_factory.mktemp("recipe"), bitext=translations)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, recipe):
    """The folder of a run that was killed twice, and the positions that each of its lives trained on."""
    output = tmp_path_factory.mktemp("disturbed") / "run"
    lives = []
    for number, (ranks, stage, micro_batch, row) in enumerate(LEGS, 1):
        witness = output.parent / f"life-{number}"
        witness.mkdir()
        launcher, config = torchrun if row else forks, f"ds_configs/zero{stage}.json"
        settings = {"launcher": [*launcher(ranks), "tests/end_to_end/witness.py"], "config": config}
        options = [*recipe, "--trainer.micro_batch", str(micro_batch)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WITNESS", str(witness))
            if row is None:
                done = pretrain(output, *options, **settings)
                assert done.returncode == 0, done.stdout + done.stderr
            else:
                kill_at_a_row(output, row, *options, lives=number, **settings)
        lives.append([int(word) for file in witness.iterdir() for word in file.read_text().split()])
    return output, lives


@pytest.mark.slow
def test_every_position_of_every_stream_is_trained_on_once(disturbed):
    output, lives = disturbed
    begun = [row for row in rows(output, "event") if row["event"] in ("start", "resume")]
    assert [(row["world_size"], row["zero_stage"]) for row in begun] == [leg[:2] for leg in LEGS]
    starts = [row["position"] for row in begun] + [STEPS * BATCH]
    assert 0 == starts[0] < starts[1] < starts[2] < starts[3], "killed in the middle"
    kept = [p for life, start, end in zip(lives, starts, starts[1:], strict=False) for p in life if p < end]
    assert sorted(kept) == list(range(STEPS * BATCH))
    size, streams = BATCH // GROUPS, sorted(KINDS)
    own: dict[str, list[int]] = {}
    for position in sorted(kept):
        number, before = locate([1.0] * len(streams), SEED, position // size)
        own.setdefault(streams[number], []).append(before * size + position % size)
    assert own.keys() == KINDS.keys() and all(one == list(range(len(one))) for one in own.values())
    # What a step trained on is what the schedule says.
    for row in rows(output, "train"):
        groups = range((row["step"] - 1) * GROUPS, row["step"] * GROUPS)
        drawn = {streams[locate([1.0] * len(streams), SEED, group)[0]] for group in groups}
        assert {kind for kind, loss in KINDS.items() if f"loss/{loss}" in row} == drawn


@pytest.mark.slow
def test_its_losses_are_those_of_an_undisturbed_run(disturbed, recipe, tmp_path):
    done = pretrain(tmp_path / "run", *recipe, config="ds_configs/zero1.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for mine, other in zip(losses(disturbed[0]), losses(tmp_path / "run"), strict=True):
        found, expected = ({name: row[name] for name in row if "loss/" in name} for row in (mine, other))
        assert found == pytest.approx(expected, abs=1e-4), f"step {mine['step']}"


@pytest.mark.slow
def test_bad_translations_are_replaced_and_logged(disturbed):
    output, _ = disturbed
    logged = [json.loads(line) for line in (output / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {entry["key"] for entry in logged} == BAD.keys()
    assert all(BAD[entry["key"]][1] in entry["reason"] for entry in logged)
    assert rows(output, "train")[STEPS - 1]["bad_samples"] == len(logged) >= 6, "each epoch meets them again"


@pytest.mark.slow
def test_a_finished_run_takes_languages_and_streams_where_that_is_allowed(disturbed, translations, tmp_path):
    output, _ = disturbed
    captioned = embedded_recipe()["data"]["pairs"]["language"]
    pairs, text = {"language": f"{captioned},ko"}, {"kind": "text", "language": "ko", "weight": 4.0}
    korean = write_recipe(tmp_path, "korean", bitext=translations, pairs=pairs)
    more = write_recipe(tmp_path, "more", bitext=translations, more=text)
    longer = ("--trainer.max_steps", str(STEPS + 2))
    refused = "change back, choose another --output, or resume with --allow_changes true"
    for options, named in (
        (korean, f"data.pairs.config.language {captioned} (now {captioned},ko)"),
        (more, "no stream data.more (now there)"),
    ):
        done = pretrain(output, *options, *longer)
        assert done.returncode == 2 and named in done.stderr and refused in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    done = pretrain(output, *more, *longer, "--data.pairs.language", "en,ko", "--allow_changes", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {STEPS}" in done.stdout and "no stream data.more (now there)" in done.stdout
    assert [row["step"] for row in rows(output, "train")] == list(range(1, STEPS + 3))
    state = json.loads((output / f"checkpoint-{STEPS + 2}" / "manifest.json").read_bytes())["data"]
    own = dict.fromkeys(KINDS, 1.0)
    assert state["phases"] == [[0, own], [STEPS * GROUPS, dict(sorted((own | {"more": 4.0}).items()))]]
