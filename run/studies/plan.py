"""The commands of a study: data, choice of learning rates, pre-training, evaluation and fine-tuning."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mug.data.errors import DataError
from mug.data.labelled_sources import open_shards
from mug.model.objectives.objective import find_objective
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import find_evaluator
from mug.run.reporting.records import read_rows
from mug.run.studies.config import BASELINES, METHODS, SCRATCH, Study, plain
from mug.run.studies.jobs import RUN, Job, flags
from mug.run.training.recipe import flat

DEEPSPEED = RUN.parent / "ds_configs" / "zero1.json"
FEATURES = ("mean of patches", "pixels", "components")  # what an encoder is evaluated by: one kind each
CROPS = [0.6, 1.0]  # shares of an image that are learned from, where the objective does not crop views of its own
WHOLE_RUN = 10**9  # steps: more than any run has

Chain = list[Job]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The jobs of a study whose files are below `folder`."""

    study: Study
    folder: Path

    def stages(self) -> Iterator[list[Chain]]:
        """Yields stages, one after the other, of chains that may run in parallel; later ones read earlier results."""
        yield [self._data(name) for name in self.study.sets]
        self.check_labels()
        yield [*self._tokenizer(), *self._shuffled()]
        if self.study.grid:
            leaders = [name for name, encoder in self.study.encoders.items() if not encoder.like]
            yield [self._rate(name, rate) for name in leaders for rate in self.study.grid.rates]
        yield [self._encoder(name, seed) for name, seed in self.runs()]
        yield [self._judges(name, self.run(*self.runs()[0]), kind) for name, kind in BASELINES.items()]
        if self.study.finetune:
            tuned = [(SCRATCH, 0), *self.runs()]
            yield [self._finetune_rates(name) for name in dict.fromkeys(name for name, _ in tuned)]
            yield [[self._finetune(name, seed)] for name, seed in tuned]

    def runs(self) -> list[tuple[str, int]]:
        """Returns (encoder, seed) of each pre-training; seeds first, so that an interrupted study has whole rounds."""
        pairs = [(name, seed) for name in self.study.encoders for seed in self.study.seeds_of(name)]
        return sorted(pairs, key=lambda pair: pair[1])

    # --- Where things lie ---

    def shards(self, name: str, split: str) -> str:
        return f"{self.folder}/sets/{name}/{split}-*.tar"

    def pool(self, name: str) -> str:
        """Returns the training shards of a pool."""
        pool = self.study.pools[name]
        if pool.shuffled:
            return f"{self.folder}/pools/{name}/train-*.tar"
        return " ".join(self.shards(one, "train") for one in pool.sets)

    def run(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / plain(f"{name} {seed}")

    def found(self, name: str, judge: str) -> Path:
        """Returns the file of an encoder's results; `name` has the seed, too, if there is one."""
        return self.folder / "found" / plain(f"{name} {judge}.jsonl")

    # --- Data ---

    def _data(self, name: str) -> Chain:
        one, out = self.study.sets[name], self.folder / "sets" / name
        command = ["build_shards.py", one.kind, *([one.source] if one.source else []), "--out", str(out)]
        return [Job(f"build {name}", command + flags(one.options), out)]

    def check_labels(self) -> None:
        """Raise RunError unless all images that encoders are judged on have the classes and groups that are asked for.

        Otherwise it would be found after hours of pre-training.
        """
        for name, one in self.study.judges.items():
            self._check_label(one.set, "train", f"judges.{name}.label", one.label)
            self._check_label(one.set, "held_out", f"judges.{name}.label", one.label)
            self._check_label(one.set, "held_out", f"judges.{name}.group", one.group)
        if grid := self.study.grid:
            self._check_label(grid.set, "train", "grid.label", grid.label)
            self._check_label(grid.set, "held_out", "grid.label", grid.label)

    def _check_label(self, name: str, split: str, setting: str, key: str) -> None:
        try:
            open_shards(self.shards(name, split), key, None)
        except DataError as error:
            raise RunError(f"{setting} is {key}: {error}") from None

    def _reads_text(self, name: str) -> bool:
        return "text_length" in self._sizes(name)

    def _sizes(self, name: str) -> set[str]:
        """Returns which sizes of a model the encoder's objective has."""
        return {field.name for field in dataclasses.fields(find_objective(self.study.objective(name)).Config)}

    def _tokenizer(self) -> Iterator[Chain]:
        if not any(map(self._reads_text, self.study.encoders)):
            return
        sets = dict.fromkeys(name for pool in self.study.pools.values() for name in pool.sets)
        out = self.folder / "tokenizer.json"
        shards = " ".join(self.shards(name, "train") for name in sets)
        values = {"out": str(out), "vocabulary": self.study.vocabulary}
        yield [Job("train tokenizer", ["train_tokenizer.py", shards, *flags(values)], out)]

    def _shuffled(self) -> Iterator[Chain]:
        for name, pool in self.study.pools.items():
            if pool.shuffled:
                out = self.folder / "pools" / name
                shards = " ".join(self.shards(one, "train") for one in pool.sets)
                command = ["build_shards.py", "shuffled", shards, "--out", str(out), "--held_out", "0"]
                yield [Job(f"shuffle {name}", command, out)]

    # --- Pre-training ---

    def _rate(self, name: str, rate: float) -> Chain:
        """Train briefly with a learning rate, and see how well it does on the grid's set."""
        grid, label = self.study.grid, f"{name} rate {rate:g}"
        assert grid is not None
        run = self._trial(name, rate)
        values = {"trainer.max_steps": max(1, grid.samples // self.study.batch), "trainer.base_learning_rate": rate}
        values["trainer.warmup_samples"] = grid.samples // 10
        judge = ["evaluate.py", str(run), "--eval", "knn", *self._validation("knn."), "--workers", "0"]
        found = self.found(label, grid.set)
        return [
            self._pretrain(label, name, grid.seed, run, values),
            Job(f"judge {label}", [*judge, "--json", str(found)], found),
        ]

    def _trial(self, name: str, rate: float) -> Path:
        return self.folder / "rates" / plain(f"{name} rate {rate:g}")

    def _validation(self, prefix: str) -> list[str]:
        """Returns the options of nearest neighbours on the grid's set."""
        grid = self.study.grid
        assert grid is not None
        values = {"data": self.shards(grid.set, "train"), "test": self.shards(grid.set, "held_out"), "k": [10]}
        values |= {"label": grid.label, "max_train": grid.max_train, "max_test": grid.max_test}
        return flags({f"{prefix}{name}": value for name, value in values.items() if value is not None})

    def tried_rates(self, name: str) -> dict[float, float]:
        """Returns learning rate → accuracy of the encoder, or of the one it is like; {} without a grid."""
        grid, leader = self.study.grid, self.study.leader_name(name)
        if grid is None:
            return {}
        files = {rate: self.found(f"{leader} rate {rate:g}", grid.set) for rate in grid.rates}
        return {rate: records_in(file, METHODS["knn"])[-1]["accuracy"] for rate, file in files.items()}

    def samples(self, name: str) -> int:
        """Returns the samples that an encoder sees, whole batches: the study's, or those for the FLOP of another."""
        study, other = self.study, self.study.encoders[name].flops_of
        share = self._flops(other) / self._flops(name) if other else 1.0
        return max(1, round(share * study.samples / study.batch)) * study.batch

    def _flops(self, name: str) -> float:
        """Returns the teraFLOP of a sample, as the trials of learning rates logged them."""
        grid, leader = self.study.grid, self.study.leader_name(name)
        assert grid is not None
        rows = read_rows(self._trial(leader, grid.rates[0]) / "metrics.jsonl")
        return statistics.median(row["tflops"] / row["images_per_s"] for row in rows if "tflops" in row)

    def _encoder(self, name: str, seed: int) -> Chain:
        """Pre-train an encoder and evaluate it."""
        study, label, run, samples = self.study, f"{name} {seed}", self.run(name, seed), self.samples(name)
        steps = samples // study.batch
        values: dict[str, Any] = {"trainer.max_steps": steps, "trainer.warmup_samples": samples // 10}
        if tried := self.tried_rates(name):
            values["trainer.base_learning_rate"] = max(tried, key=lambda rate: tried[rate])
        if study.curve:
            values["evals.knn.every"] = max(1, steps // study.curve)
        chain = [self._pretrain(label, name, seed, run, values), *self._judges(label, run, "checkpoint")]
        return [*chain, *self._others(name, label, run)]

    def _pretrain(self, label: str, name: str, seed: int, run: Path, values: dict[str, Any]) -> Job:
        study, leader = self.study, self.study.leader(name)
        objective = find_objective(study.objective(name))
        own = self._sizes(name)
        sizes = {f"model.{key}": value for key, value in study.model.items() if key in own}
        recipe = flat(study.recipe) | flat(leader.recipe) | flat(study.encoders[name].recipe)
        data = {} if objective.views(objective.Config()) else {"data.crop_scale": CROPS}
        data |= {"data.shards": self.pool(study.pool_of(name)), "data.workers": 0}
        if self._reads_text(name):
            data["data.tokenizer"] = str(self.folder / "tokenizer.json")
        fixed = ({} if study.base else data) | {
            "objective": study.objective(name),
            "trainer.global_batch": study.batch,
            "trainer.micro_batch": study.batch,
            "trainer.eval_every": WHOLE_RUN,
            "checkpoint.every_steps": 200,
            "checkpoint.keep": 1,
            "seed": seed,
        }
        recipe_file = study.base or str(RUN / "studies" / "base" / "pretrain.yaml")
        base = ["--config", recipe_file, "--deepspeed", str(DEEPSPEED)]
        curve = self._validation("evals.knn.") if "evals.knn.every" in values else []
        command = ["pretrain.py", *base, "--output", str(run), *flags(sizes | fixed | recipe | values), *curve]
        return Job(f"pre-train {label}", command, run, resumes=True)

    # --- Evaluation ---

    def _judges(self, label: str, run: Path, encoder: str) -> Chain:
        """Evaluate a frozen encoder, or a baseline of the sizes of this run, on each judge."""
        return [self._judge(label, run, encoder, judge) for judge in self.study.judges]

    def _judge(self, label: str, run: Path, encoder: str, judge: str) -> Job:
        one, found, options = self.study.judges[judge], self.found(label, judge), []
        data = {"data": self.shards(one.set, "train"), "test": self.shards(one.set, "held_out"), "label": one.label}
        data |= {"max_train": one.max_train, "max_test": one.max_test, "encoder": encoder, "hits": True}
        data["seeds"] = self.study.seeds if encoder == "random" else 1
        for name, own in self.study.frozen.items():
            values = {key: value for key, value in (data | own).items() if value is not None}
            options += ["--eval", name, *flags({f"{name}.{key}": value for key, value in values.items()})]
        command = ["evaluate.py", str(run), *options, "--workers", "0", "--batch", "250", "--json", str(found)]
        return Job(f"judge {label} on {judge}", command, found)

    def _others(self, name: str, label: str, run: Path) -> Iterator[Job]:
        """The further evaluations that the encoder's objective is able to, each once."""
        objective = find_objective(self.study.objective(name))
        for heading, one in self.study.others.items():
            if self.evaluation(heading) == heading and find_evaluator(one.eval).suits(objective):
                found = self.found(label, heading)
                values = {f"{one.eval}.{key}": self._filled(value) for key, value in one.options.items()}
                command = ["evaluate.py", str(run), "--eval", one.eval, *flags(values), "--workers", "0"]
                yield Job(f"{heading}, {label}", [*command, "--json", str(found)], found)

    def evaluation(self, heading: str) -> str:
        """Returns the first of the columns that show metrics of the same evaluation: it names the results."""
        others = self.study.others
        asked = {name: (one.eval, one.options) for name, one in others.items()}
        return next(name for name in others if asked[name] == asked[heading])

    def _filled(self, value: Any) -> Any:
        return value.replace("{sets}", str(self.folder / "sets")) if isinstance(value, str) else value

    # --- Fine-tuning ---

    def tuned(self, name: str, what: object) -> Path:
        """Returns the folder of a fine-tuning: `what` is its seed, or the rate that it tries."""
        return self.folder / "tuned" / plain(f"{name} {what}")

    def _finetune_rates(self, name: str) -> Chain:
        config = self.study.finetune
        assert config is not None
        paths = sorted((self.folder / "sets" / config.train).glob("train-*.tar"))
        learn, check = " ".join(map(str, paths[:-1])), str(paths[-1])
        return [self._tune(name, f"rate {rate:g}", 0, rate, learn, check) for rate in config.rates]

    def tuned_rates(self, name: str) -> dict[float, float]:
        """Returns learning rate → accuracy on the part of the labels that was kept back."""
        config = self.study.finetune
        assert config is not None
        return {rate: tuned_accuracy(self.tuned(name, f"rate {rate:g}")) for rate in config.rates}

    def _finetune(self, name: str, seed: int) -> Job:
        config, tried = self.study.finetune, self.tuned_rates(name)
        assert config is not None
        rate = max(tried, key=lambda one: tried[one])
        train, test = self.shards(config.train, "train"), self.shards(config.test, "held_out")
        return self._tune(name, seed, seed, rate, train, test)

    def _tune(self, name: str, what: object, seed: int, rate: float, train: str, test: str) -> Job:
        config, run = self.study.finetune, self.tuned(name, what)
        assert config is not None
        classify = find_objective("classify").Config
        own = {field.name for field in dataclasses.fields(classify)}
        values = {f"model.{key}": value for key, value in self.study.model.items() if key in own} | {
            "data.images": train,
            "data.test": test,
            "data.workers": 0,
            "trainer.epochs": config.epochs,
            "trainer.base_learning_rate": rate,
            "trainer.eval_every": WHOLE_RUN,  # at the end
            "trainer.layer_decay": 1.0 if name == SCRATCH else 0.75,  # there is nothing to preserve from scratch
            "seed": seed,
        }
        recipe_file = str(RUN / "recipes" / "classify" / "fashion_mnist_tiny.yaml")
        base = ["--config", recipe_file, "--deepspeed", str(DEEPSPEED)]
        init = [] if name == SCRATCH else ["--init", str(self.run(name, seed))]
        command = ["finetune.py", *base, "--output", str(run), *init, *flags(values | flat(config.recipe))]
        return Job(f"fine-tune {name} {what}", command, run, resumes=True)


def records_in(found: Path, method: str) -> list[dict[str, Any]]:
    """Returns the records of a method, by the one kind of features that encoders are evaluated by."""
    rows = read_rows(found)
    return [row for row in rows if row.get("method") == method and row.get("feature") in FEATURES]


def tuned_accuracy(run: Path) -> float:
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"]
    return rows[-1]["accuracy/class"]
