"""What a study found: tables, and the page with its learning curves."""

import functools
import statistics
from dataclasses import dataclass

import numpy as np

from mug.data.labelled_sources import open_shards
from mug.data.order import spread as spread_over
from mug.run.reporting.chart import Line
from mug.run.reporting.markdown_tables import spread, table
from mug.run.reporting.metrics import Figure
from mug.run.reporting.page import render
from mug.run.reporting.records import read_rows
from mug.run.reporting.sections import PLOT, Block, charts
from mug.run.studies.config import BASELINES, METHODS, SCRATCH, JudgeConfig
from mug.run.studies.jobs import file_of, read_record
from mug.run.studies.leaks import leaks
from mug.run.studies.plan import Plan, records_in, tuned_accuracy
from mug.run.studies.statistics import ALPHA, Difference, difference, image_error, separable
from mug.run.training.collapse import FLOORS as COLLAPSE
from mug.run.training.collapse import is_low

UNTRAINED = "untrained"
CURVE = "accuracy/knn, mean of patches, k = 10"

Table = tuple[list[str], list[list[str]]]  # head, rows


@dataclass(frozen=True, eq=False)
class Results:
    """Reads what the jobs of a plan have written."""

    plan: Plan

    # --- Values ---

    def labels(self, name: str) -> list[str]:
        """Returns the names of an encoder's runs, or of a baseline."""
        return [name] if name in BASELINES else [f"{name} {seed}" for seed in self.plan.study.seeds_of(name)]

    def on(self, name: str, judge: str, method: str) -> list[float]:
        """Returns the accuracy on a judge for each seed."""
        rows = [records_in(self.plan.found(label, judge), method)[-1] for label in self.labels(name)]
        return [value for row in rows for value in row["values"]]

    def overall(self, name: str) -> list[float]:
        """Returns for each seed the mean over judges and over the evaluations of frozen encoders."""
        of_each = [self.on(name, judge, method) for judge in self.plan.study.judges for method in self.methods]
        return [statistics.fmean(values) for values in zip(*of_each, strict=True)]

    @property
    def methods(self) -> list[str]:
        return [METHODS[name] for name in self.plan.study.frozen]

    def compare(self, ours: str, theirs: str) -> Difference:
        """Returns the difference of two encoders' overall accuracy."""
        seeds = min(len(self.labels(name)) for name in (ours, theirs))
        tasks = [
            (self._hits(ours, judge, seeds) - self._hits(theirs, judge, seeds), self.groups(judge))
            for judge in self.plan.study.judges
        ]
        return difference(self.overall(ours), self.overall(theirs), image_error(tasks))

    def _hits(self, name: str, judge: str, seeds: int) -> np.ndarray:
        """Returns for each test image the share of seeds and evaluations that were right."""
        files = [self.plan.found(label, judge) for label in self.labels(name)[:seeds]]
        rows = [records_in(file, method)[-1] for file in files for method in self.methods]
        return np.mean([np.frombuffer(row["hits"][0].encode(), np.uint8) - ord("0") for row in rows], axis=0)

    def collapsed(self, name: str, judge: str) -> str:
        """Returns a remark if the features of a judge's test images are alike, of one seed or more; else nothing."""
        files = [self.plan.found(label, judge) for label in self.labels(name)]
        rows = [row for file in files for row in records_in(file, METHODS["knn"])[-1:]]
        low = [row for row in rows if any(is_low(key, row[key]) for key in COLLAPSE if key in row)]
        if not low:
            return ""
        seeds = f" with {len(low)} of {len(rows)} seeds" * (len(rows) > 1)
        std, rank = (min(row[key] for row in low) for key in COLLAPSE)
        return f", collapsed{seeds} (std {std:.2f}, rank {rank:.1f})"

    @functools.cache  # noqa: B019  a study's results are read once
    def groups(self, judge: str) -> list[str]:
        """Returns the group of each test image."""
        one = self.plan.study.judges[judge]
        return groups_of(self.plan.shards(one.set, "held_out"), one)

    def cost(self, name: str) -> dict[str, float]:
        """Returns medians over the seeds: images/s, GFLOP of a sample, and CPU seconds of pre-training."""
        rates, flops, seconds = [], [], []
        for label, run in ((label, self.plan.run(name, seed)) for seed, label in enumerate(self.labels(name))):
            rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
            rates += [row["images_per_s"] for row in rows]
            flops += [1e3 * row["tflops"] / row["images_per_s"] for row in rows if "tflops" in row]
            seconds.append(read_record(file_of(f"pre-train {label}", self.plan.folder, "done", "json"))["cpu_seconds"])
        medians = map(statistics.median, (rates, flops, seconds))
        return dict(zip(("images/s", "GFLOP", "CPU s"), medians, strict=True))

    # --- Tables ---

    def accuracy(self) -> Table:
        """Accuracy of the frozen encoders, and of the baselines."""
        study, untrained = self.plan.study, statistics.fmean(self.overall(UNTRAINED))
        head = ["encoder", "seeds", *study.judges, "mean", f"mean - {UNTRAINED}"]
        rows = []
        for name in [*study.encoders, *BASELINES]:
            overall = self.overall(name)
            cells = [
                " / ".join(f"{100 * statistics.fmean(self.on(name, judge, method)):.1f}" for method in self.methods)
                + self.collapsed(name, judge)
                for judge in study.judges
            ]
            ahead = f"{100 * (statistics.fmean(overall) - untrained):+.2f}"
            rows.append([name, str(len(overall)), *cells, spread(overall), ahead])
        return head, rows

    def comparisons(self) -> Table:
        """The declared differences, with intervals at the levels that Holm's procedure asks for."""
        pairs = self.plan.study.comparisons
        found = [self.compare(ours, theirs) for ours, theirs in pairs]
        halves = separable(found)
        rows = []
        for (ours, theirs), one, (half, clear) in zip(pairs, found, halves, strict=True):
            rows.append([f"{ours} - {theirs}", str(one.seeds), verdict(one, half, clear)])
        return ["difference of the means, points", "seeds", f"interval ({1 - ALPHA:.0%} in all, Holm)"], rows

    def costs(self) -> Table:
        """What each encoder has cost; the first encoder's FLOP are the unit."""
        study, rows = self.plan.study, []
        costs = {name: self.cost(name) for name in study.encoders}
        total = {name: one["GFLOP"] * self.plan.samples(name) for name, one in costs.items()}
        unit = total[next(iter(total))]
        for name, one in costs.items():
            row = [name, f"{self.plan.samples(name):,}", f"{total[name] / 1e3:,.1f}", f"{total[name] / unit:.2f}"]
            rows.append([*row, f"{one['CPU s']:,.0f}", f"{one['images/s']:,.0f}", self._rate(name)])
        head = ["encoder", "samples", "TFLOP", "× the first", "CPU s", "images/s", "learning rate"]
        return head, rows

    def _rate(self, name: str) -> str:
        """Returns the chosen learning rate, and whether a larger or smaller one might have been better."""
        if not (tried := self.plan.tried_rates(name)):
            return "the recipe's"
        best = max(tried, key=lambda rate: tried[rate])
        return f"{best:g}" + " (edge of the grid)" * (best in (min(tried), max(tried)))

    def further(self) -> Table:
        """Fine-tuning, and the further evaluations of the encoders that are able to them."""
        study, plan = self.plan.study, self.plan
        tuning = [f"fine-tuned, {study.finetune.test}", "its rate"] if study.finetune else []
        rows = []
        for name in [*study.encoders, *([SCRATCH] if study.finetune else [])]:
            row = [name]
            if study.finetune:
                seeds = [0] if name == SCRATCH else study.seeds_of(name)
                tried = plan.tuned_rates(name)
                row.append(spread([tuned_accuracy(plan.tuned(name, seed)) for seed in seeds]))
                row.append(f"{max(tried, key=lambda rate: tried[rate]):g}")
            rows.append([*row, *(self._other(name, heading) for heading in study.others)])
        return ["encoder", *tuning, *study.others], rows

    def _other(self, name: str, heading: str) -> str:
        one, values = self.plan.study.others[heading], []
        for label in self.labels(name) if name in self.plan.study.encoders else ():
            found = self.plan.found(label, self.plan.evaluation(heading))
            values += [row[one.metric] for row in (read_rows(found) if found.is_file() else []) if one.metric in row]
        if not values:
            return ""
        if one.metric.startswith(("accuracy", "R@")):
            return spread(values)
        return f"{statistics.fmean(values):.3f}"

    def tables(self) -> dict[str, Table]:
        """Returns all tables that have something in them, by their captions."""
        study = self.plan.study
        methods = " / ".join(self.methods)
        found = {f"Frozen encoders: {methods}, percent; mean ± standard deviation over seeds": self.accuracy()}
        if study.comparisons:
            found["Declared comparisons, paired by seed"] = self.comparisons()
        if study.finetune or study.others:
            found["Fine-tuning and further evaluations"] = self.further()
        found["Cost of pre-training"] = self.costs()
        found["Test pictures that the pool holds"] = leaks(self.plan)
        return found

    # --- Pages ---

    def markdown(self, introduction: str) -> str:
        parts = (f"{caption}.\n\n{table(*one)}" for caption, one in self.tables().items())
        return "\n\n".join([introduction, *parts])

    def html(self, introduction: str) -> str:
        """Returns one page, with the learning curves."""
        note = introduction.replace("`", "")  # of Markdown
        blocks = {
            caption: [Block(note=note * (not number), tables=[plain(one)])]
            for number, (caption, one) in enumerate(self.tables().items())
        }
        if lines := self.curves():
            title = "Nearest neighbours on the grid's set"
            blocks["Learning curves, first seed"] = charts([Figure("", title, lines)], "samples seen", [])
        return render("report.html", title=self.plan.study.title, sections=blocks, plot=PLOT)

    def curves(self) -> list[Line]:
        """Returns accuracy over samples seen, of each encoder's first seed."""
        study, lines = self.plan.study, []
        for name in study.encoders:
            rows = [row for row in read_rows(self.plan.run(name, 0) / "metrics.jsonl") if row.get(CURVE) is not None]
            if rows:
                points = [(row["step"] * study.batch, row[CURVE]) for row in rows]
                lines.append(Line(name, len(lines), points, marked=True))
        return lines


def plain(one: Table) -> Table:
    """Returns a table without Markdown's bold face."""
    head, rows = one
    return head, [[cell.replace("**", "") for cell in row] for row in rows]


def verdict(one: Difference, half: float | None, clear: bool) -> str:
    """Returns a cell: the difference in points, its half-width, and whether it is separable from 0.

    half: at the level that the comparison was held to; None of one seed.
    """
    if half is None:
        return f"{100 * one.mean:+.2f}, one seed: no interval"
    interval = f"{100 * one.mean:+.2f} ± {100 * half:.2f}"
    return f"**{interval}**" if clear else f"{interval}, not separable"


def groups_of(shards: str, judge: JudgeConfig) -> list[str]:
    """Returns the group of each test image of a judge, in the order in which evaluations take them."""
    groups = open_shards(shards, judge.group, None).labels
    if judge.max_test is None or judge.max_test >= len(groups):
        return groups
    return [groups[number] for number in spread_over(len(groups), judge.max_test)]
