"""The ablations of UniX²'s table 3: what each run leaves out, and that its command is one that pretrain.py takes."""

import pytest
from train_commands import parse

from mug.model.objectives.unix2 import UniX2
from mug.run import benchmark
from mug.run.studies.plan import Plan

STUDY = benchmark.STUDIES / "unix2.yaml"
LEFT_OUT = {
    "all tasks": set(),
    "without ITM": {"itm"},
    "without MLM": {"mlm"},
    "without CMCL": {"cmcl"},
    "without mMMT": {"mmmt", "mmmt_mlm"},
    "without vPLM": {"vplm"},
}


KINDS = ("pairs", "image_bitext", "bitext", "text")


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """On streams of the names that the study's own base has."""
    folder = tmp_path_factory.mktemp("study")
    streams = "".join(f"  {kind}: {{kind: {kind}, weight: 1}}\n" for kind in KINDS)
    (folder / "base.yaml").write_text(f"data:\n{streams}", encoding="utf-8")
    options = ["--base", str(folder / "base.yaml"), "--out", str(folder)]
    return Plan(benchmark.parse([str(STUDY), *options]).study, folder)


def test_each_run_leaves_out_one_task_and_has_the_recipes_data(plan, monkeypatch):
    monkeypatch.setattr(Plan, "check_labels", lambda plan: None)  # there are no pictures
    jobs = {job.name: job for chains in plan.stages() for chain in chains for job in chain}
    for name, left_out in LEFT_OUT.items():
        recipe = parse("pretrain", jobs[f"pre-train {name} 0"].command[1:]).recipe
        assert {*UniX2.losses} - {*recipe.active_losses} == left_out, name
        assert {*KINDS} - {*recipe.data} == ({"image_bitext"} if "mmmt" in left_out else set()), name
        assert (recipe.trainer.global_batch, recipe.trainer.groups, recipe.trainer.max_steps) == (128, 4, 380)
    judged = [name for name in jobs if name.startswith(("retrieval", "captions", "translation"))]
    assert len(judged) == 3 * len(LEFT_OUT)


def test_every_run_is_compared_with_all_tasks(plan):
    assert plan.study.comparisons == [["all tasks", name] for name in LEFT_OUT if name != "all tasks"]
    assert benchmark.parse([str(STUDY)]).study.base == "run/recipes/unix2/tiny.yaml"
