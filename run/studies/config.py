"""The design of a study, as its YAML gives it: data, encoders, budget, judges, and comparisons declared beforehand."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mug.model.objectives.objective import objective_names
from mug.run.common.command_line import Parser, check_min
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import find_evaluator

BASELINES = {"raw pixels": "pixels", "components of pixels": "components", "untrained": "random"}  # --encoder of each
METHODS = {"knn": "kNN", "linear_probe": "linear probe", "attentive_probe": "attentive probe"}  # in records
SCRATCH = "from scratch"
FOLDER = re.compile(r"[\w-][\w.-]*")  # name of a set or pool


@dataclass(frozen=True)
class SetConfig:
    """A data set, written as shards by run/build_shards.py.

    Args:
        kind: of data, as build_shards.py names it.
        source: folder or file, where the kind needs one, or it lies elsewhere than Debian's package puts it.
        options: further ones of build_shards.py.
    """

    kind: str
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolConfig:
    """Image-text pairs to learn from: the training shards of some sets.

    Args:
        sets: their names.
        shuffled: give each image the caption of another one: the control of what right captions add.
    """

    sets: list[str]
    shuffled: bool = False


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder that is pre-trained and evaluated: a row of the table.

    Args:
        objective: what is learned: the name of a file in model/objectives/.
        like: another encoder whose objective, recipe and learning rate this one has.
        pool: what it learns from; without it, the first pool.
        seeds: of pre-training: 0, 1, …; without it, the study's.
        flops_of: another encoder: this one sees as many samples as cost what the other one's do; needs a grid.
        recipe: values of its recipe, by section, in addition to the study's.
    """

    objective: str | None = None
    like: str | None = None
    pool: str | None = None
    seeds: int | None = None
    flops_of: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GridConfig:
    """Peak learning rates, of which each encoder takes the one that is best by nearest neighbours on `set`, which is
    not a judge: on its held-out images, against its training images.

    Args:
        rates: values of trainer.base_learning_rate.
        samples: seen with each.
        set: the name of a set with labels.
        label: key of the json that holds the class.
        max_train: training images taken, spread over the set.
        max_test: held-out images taken, likewise.
        seed: of these runs, which is none of the study's.
    """

    rates: list[float]
    samples: int
    set: str
    label: str = "label"
    max_train: int | None = None
    max_test: int | None = None
    seed: int = 100


@dataclass(frozen=True)
class JudgeConfig:
    """A labelled set that frozen encoders are evaluated on; no pool holds its pictures.

    Args:
        set: its name.
        label: key of the json that holds the class.
        group: key of the json that pictures of one thing share, such as the frames of an animation: the unit of the
            bootstrap.
        max_train: training images taken, spread over the set.
        max_test: test images taken, likewise.
    """

    set: str
    label: str = "label"
    group: str = "key"
    max_train: int | None = None
    max_test: int | None = None


@dataclass(frozen=True)
class FinetuneConfig:
    """End-to-end training on few labels by run/finetune.py.

    Each encoder, and one from scratch, takes the rate that is best on the last training shard when it learns from the
    others; then it learns from all.

    Args:
        train: the set whose training shards are learned from: at least two.
        test: the set whose held-out shards are tested on.
        rates: values of trainer.base_learning_rate.
        epochs: passes over the training images.
        recipe: further values of its recipe, by section.
    """

    train: str
    test: str
    rates: list[float]
    epochs: float
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherConfig:
    """One more evaluation, of the encoders whose objectives have the ability: a column of the table.

    Args:
        eval: the name of a file in run/evaluators/.
        metric: the one that is shown.
        options: of the evaluation; {sets} stands for the folder of all sets.
    """

    eval: str
    metric: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A comparison of encoders.

    Args:
        title: heading of the table.
        sets: the data, by name.
        pools: what is learned from, by name; the first is that of encoders which name none.
        base: a recipe that each pre-training begins with, and whose data it has, instead of those of a pool; of a pool
            then only the pictures matter, which no judge may have.
        encoders: what is compared, by name.
        judges: the labelled sets to evaluate on, by name.
        comparisons: pairs of encoders whose difference is tested; no claims are made about others.
        model: sizes; each objective takes those that it has.
        recipe: values of all encoders' recipes, by section.
        frozen: evaluations of frozen encoders on each judge, and their options.
        samples: seen by each encoder.
        batch: samples of a step.
        seeds: of pre-training.
        vocabulary: of the tokenizer.
        grid: choice of learning rates; without it, they are the recipes'.
        finetune: training on few labels.
        others: further evaluations, by the heading of their column.
        curve: accuracy in training on the grid's set, so many times.
    """

    title: str
    sets: dict[str, SetConfig]
    pools: dict[str, PoolConfig]
    encoders: dict[str, EncoderConfig]
    judges: dict[str, JudgeConfig]
    comparisons: list[list[str]]
    samples: int
    batch: int
    seeds: int = 1
    vocabulary: int = 4096
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: GridConfig | None = None
    finetune: FinetuneConfig | None = None
    others: dict[str, OtherConfig] = field(default_factory=dict)
    curve: int = 0
    base: str | None = None

    def objective(self, name: str) -> str:
        """Returns the objective of an encoder, its own or that of the one it is like."""
        return str(self.leader(name).objective)

    def leader(self, name: str) -> EncoderConfig:
        """Returns the encoder whose objective, recipe and rate this one has: itself unless it is like another."""
        return self.encoders[self.leader_name(name)]

    def leader_name(self, name: str) -> str:
        return self.encoders[name].like or name

    def seeds_of(self, name: str) -> range:
        return range(self.encoders[name].seeds or self.seeds)

    def pool_of(self, name: str) -> str:
        return self.encoders[name].pool or next(iter(self.pools))


def add_study(parser: Parser) -> None:
    """Give a parser the options of a study: `--config FILE`, and each key."""
    parser.add_argument("--config", action="config", help="the study, a YAML file of run/studies/")
    parser.add_class_arguments(Study)


def study_of(values: Any) -> Study:
    """Returns the study that a parser of `add_study` has parsed and instantiated.

    Raises:
        RunError: a number out of range, or a name of nothing.
    """
    return checked(Study(**{one.name: values[one.name] for one in dataclasses.fields(Study)}))


def checked(study: Study) -> Study:
    """Returns the study.

    Raises:
        RunError: a number out of range, a name of nothing, one that cannot be that of a file, or nothing to compare.
    """
    check_min(study, {"samples": 1, "batch": 1, "seeds": 1, "vocabulary": 300, "curve": 0})
    _check_names(study)
    _check_present(study)
    for name, encoder in study.encoders.items():
        if (encoder.objective is None) == (encoder.like is None):
            raise RunError(f"encoders.{name} must have either an objective, or the encoder that it is like")
        if encoder.like and (encoder.like not in study.encoders or study.encoders[encoder.like].like):
            raise RunError(f"encoders.{name}.like {encoder.like} must be an encoder with an objective of its own")
        check_min(encoder, {"seeds": 1}, f"encoders.{name}.")
        if encoder.flops_of and not study.grid:
            raise RunError(f"encoders.{name}.flops_of needs a grid, whose runs show the FLOP of a sample")
    for what, name, names in _mentions(study):
        if name not in names:
            raise RunError(f"{what} {name!r} is not one of {', '.join(names)}")
    for name in study.frozen:
        find_evaluator(name)
        if name not in METHODS:
            raise RunError(f"frozen.{name} does not evaluate frozen encoders: give some of {', '.join(METHODS)}")
    for other in study.others.values():
        find_evaluator(other.eval)
    return study


def _check_names(study: Study) -> None:
    """Check that sets and pools are named as folders, and that no two names give the same file."""
    for what, names in (("sets", study.sets), ("pools", study.pools)):
        for name in names:
            if not FOLDER.fullmatch(name):
                raise RunError(f"{what} {name!r} is the name of a folder: give letters, digits, `_`, `-` and `.` alone")
    encoders, columns = [*study.encoders, *BASELINES, SCRATCH], [*study.judges, *study.others]
    for what, names in (("encoders", encoders), ("judges and others", columns)):
        for one, other in itertools.combinations(names, 2):
            if plain(one) == plain(other):
                raise RunError(f"{what} {one!r} and {other!r} have the same files, {plain(one)}: rename one")


def _check_present(study: Study) -> None:
    """Check that there is something to compare, and to choose from."""
    lists: dict[str, Any] = {name: getattr(study, name) for name in ("pools", "encoders", "judges", "frozen")}
    lists |= {f"pools.{name}.sets": pool.sets for name, pool in study.pools.items()}
    lists |= {f"{name}.rates": one.rates for name in ("grid", "finetune") if (one := getattr(study, name))}
    for name, one in lists.items():
        if not one:
            raise RunError(f"{name} is empty: give one or more")
    for pair in study.comparisons:
        if len({*pair}) != 2 or len(pair) != 2:
            raise RunError(f"comparisons {pair} must be two different encoders")


def plain(name: str) -> str:
    """Returns a name as that of a file without spaces."""
    return "".join(character if character.isalnum() or character in ".-" else "_" for character in name)


def _mentions(study: Study) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Yields where a name is mentioned, the name, and those that there are."""
    sets = study.sets
    yield from ((f"pools.{name}.sets", one, sets) for name, pool in study.pools.items() for one in pool.sets)
    yield from ((f"judges.{name}.set", judge.set, sets) for name, judge in study.judges.items())
    yield from ((f"encoders.{name}.pool", study.pool_of(name), study.pools) for name in study.encoders)
    yield from (("flops_of", one.flops_of, study.encoders) for one in study.encoders.values() if one.flops_of)
    yield from (("comparisons", name, study.encoders) for pair in study.comparisons for name in pair)
    if study.grid:
        yield "grid.set", study.grid.set, sets
    if study.finetune:
        yield from (("finetune", name, sets) for name in (study.finetune.train, study.finetune.test))


def runnable(study: Study) -> tuple[Study, list[str]]:
    """Returns the study without the encoders whose objective does not exist, or that see as many samples as cost the
    FLOP of such a one, and the names of these objectives."""
    known = objective_names()
    missing = sorted({study.objective(name) for name in study.encoders} - {*known})
    needs = {
        name: {study.objective(name), study.objective(one.flops_of or name)} for name, one in study.encoders.items()
    }
    encoders = {name: one for name, one in study.encoders.items() if needs[name] <= {*known}}
    comparisons = [pair for pair in study.comparisons if all(name in encoders for name in pair)]
    if not encoders:
        raise RunError(f"none of the study's objectives exists: {', '.join(missing)}")
    return dataclasses.replace(study, encoders=encoders, comparisons=comparisons), missing
