#!/usr/bin/env python3
"""What does each half of MUG's loss teach? Pre-train three ways, judge the encoders alike, write the table.

    python run/experiments.py --quick                  # about 4 minutes on 2 CPU cores
    python run/experiments.py                          # about 50 minutes on 2 CPU cores
    python run/experiments.py --openclipart FOLDER     # also on Debian's clip art, unpacked there: 15 minutes more

MUG (both losses), pixels alone (MAE) and captions alone see the same number of samples of Fashion-MNIST, captioned by
class ("a photo of a sneaker"). Then: linear probe, k nearest neighbours, fine-tuning; an untrained encoder and raw
pixels are the floors. Every part is one of the commands in run/, with its log under OUT/logs; without a GPU, each core
works on one part. Started again, it goes on where it stopped: finished parts are not run twice. The table goes into
the file of --results.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from jsonargparse import Namespace

from mug.data import fashion_mnist
from mug.run.evaluation.results import spread, table, write_section
from mug.run.training.command_line import Parser
from mug.run.training.console import Console, run_command
from mug.run.training.errors import RunError
from mug.run.training.metrics import read_rows

RUN = Path(__file__).parent
DEEPSPEED = RUN.parent / "ds_configs" / "zero1.json"
OBJECTIVES = {"MUG": (1.0, 0.1), "pixels alone": (1.0, 0.0), "captions alone": (0.0, 0.1)}  # weights of the two losses
DECODERS = {
    "pixel_width": 64,
    "pixel_depth": 2,
    "pixel_heads": 4,
    "text_width": 64,
    "text_heads": 4,
    "text_unimodal_layers": 1,
    "text_cross_layers": 1,
    "text_length": 16,
}


@dataclass(frozen=True)
class Study:
    """One data set and how much is done with it.

    images: most of each split. samples: seen in pre-training. encoder: its sizes.
    """

    kind: str
    source: str
    images: int
    seeds: int
    samples: int
    finetune_epochs: int
    encoder: dict[str, int]


def studies(options: Namespace) -> list[Study]:
    size = {"width": 96, "depth": 3 if options.quick else 6, "heads": 3}
    encoder = {"image_size": 28, "patch_size": 7 if options.quick else 4, **size}
    amounts = (4_000, 1, 25_600, 4) if options.quick else (30_000, 3, 150_000, 2)
    chosen = [Study("fashion-mnist", options.fashion_mnist, *amounts, encoder)]
    if options.openclipart:
        amounts = (1_000, 1, 6_400, 4) if options.quick else (10_000, 1, 30_000, 2)
        encoder = {"image_size": 64, "patch_size": 16 if options.quick else 8, **size}
        chosen.append(Study("openclipart", options.openclipart, *amounts, encoder))
    return chosen


@dataclass(frozen=True)
class Part:
    """One command; `produces` is removed before it is run anew, unless the command goes on by itself."""

    name: str
    command: list[str]
    produces: Path | None = None


def main(console: Console) -> None:
    options = parse()
    out = Path(options.out or ("runs/experiments-quick" if options.quick else "runs/experiments"))
    said = []
    for study in studies(options):
        folder = out / study.kind
        for chains in stages(study, folder):
            run_side_by_side(chains, folder, console)
        said.append(report(study, folder))
    heading = "Pixels, captions, or both" + (" (quick form)" if options.quick else "")
    write_section(Path(options.results), heading, "\n\n".join([introduction(options, out), *said]))
    console.say(f"{options.results}: {heading}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        RunError: an unknown flag, or a folder that is not there.
    """
    parser = Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, seeds and samples: about 4 minutes")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the runs (runs/experiments…)")
    parser.add_argument("--results", type=str, default="docs/results.md", help="file to write the table into")
    parser.add_argument(
        "--fashion_mnist", type=str, default=str(fashion_mnist.INSTALLED), help="folder of the four idx files"
    )
    parser.add_argument("--openclipart", type=str | None, default=None, help="folder that holds Debian's clip art")
    options = parser.parse_args(arguments)
    for name in ("fashion_mnist", "openclipart"):
        if options[name] and not Path(options[name]).is_dir():
            raise RunError(f"--{name} {options[name]}: no such folder; unpack Debian's package, and name it")
    return options


# --- Parts ------------------------------------------------------------------------------------------------


def stages(study: Study, folder: Path) -> Iterator[list[list[Part]]]:
    """All commands of a study: stages, one after the other, of chains that may run side by side."""
    shards, tokenizer = folder / "shards", folder / "tokenizer.json"
    build = ["build_shards.py", study.kind, study.source, "--out", str(shards), "--most", str(study.images)]
    learn = ["train_tokenizer.py", f"{shards}/train-*.tar", "--out", str(tokenizer), "--vocabulary", "2048"]
    yield [[Part("build shards", build, shards), Part("train tokenizer", learn, tokenizer)]]
    yield [of_encoder(study, folder, objective, seed) for seed in range(study.seeds) for objective in OBJECTIVES]
    first = str(run_of(folder, "MUG", 0))
    yield [
        [finetune(study, folder, "untrained", None)],
        list(judge(folder, "untrained", [first, "--encoder", "random", "--seeds", str(study.seeds)])),
        list(judge(folder, "raw pixels", [first, "--encoder", "pixels", "--seeds", "1"])),
    ]


def of_encoder(study: Study, folder: Path, objective: str, seed: int) -> list[Part]:
    """Pre-train an encoder and judge it; that of the first seed is fine-tuned, too."""
    run = run_of(folder, objective, seed)
    chain = [pretrain(study, folder, objective, seed)]
    chain += judge(folder, f"{objective} {seed}", [str(run), "--seeds", "1"])
    return chain if seed else [*chain, finetune(study, folder, objective, run)]


def run_of(folder: Path, objective: str, seed: int) -> Path:
    return folder / f"{objective} {seed}".replace(" ", "_")


def pretrain(study: Study, folder: Path, objective: str, seed: int) -> Part:
    pixels, caption = OBJECTIVES[objective]
    values = {f"model.{name}": value for name, value in {**study.encoder, **DECODERS}.items()} | {
        "data.shards": f"{folder}/shards/train-*.tar",
        "data.tokenizer": folder / "tokenizer.json",
        "data.workers": 0,
        "data.crop_scale": "[0.6, 1.0]",
        "trainer.global_batch": 64,
        "trainer.micro_batch": 64,
        "trainer.max_steps": study.samples // 64,
        "trainer.base_learning_rate": 4e-3,
        "trainer.warmup_samples": study.samples // 10,
        "loss_weights.pixels": pixels,
        "loss_weights.caption": caption,
        "checkpoint.every_steps": 200,
        "checkpoint.keep": 1,
        "seed": seed,
    }
    command = ["pretrain.py", "--deepspeed", str(DEEPSPEED), "--output", str(run_of(folder, objective, seed))]
    return Part(f"pre-train {objective} {seed}", command + flags(values))


def judge(folder: Path, name: str, encoder: list[str]) -> Iterator[Part]:
    """Linear probe and nearest neighbours of one encoder; the second finds the first one's features on disk."""
    images = ["--data", f"{folder}/shards/train-*.tar", "--test", f"{folder}/shards/held_out-*.tar"]
    for script in ("linear_probe", "knn"):
        found = folder / "found" / f"{name} {script}.jsonl"
        command = [f"{script}.py", *encoder, *images, "--workers", "0", "--json", str(found)]
        yield Part(f"{script} {name}", command, found)


def finetune(study: Study, folder: Path, name: str, init: Path | None) -> Part:
    recipe = RUN / "recipes" / "finetune" / "fashion_mnist_tiny.yaml"
    values = {f"model.{name}": value for name, value in study.encoder.items()} | {
        "data.images": f"{folder}/shards/train-*.tar",
        "data.test": f"{folder}/shards/held_out-*.tar",
        "data.workers": 0,
        "trainer.epochs": study.finetune_epochs,
        "trainer.global_batch": 64,
        "trainer.micro_batch": 64,
        "trainer.base_learning_rate": 4e-3,
        "trainer.warmup_samples": study.images * study.finetune_epochs // 10,
        "trainer.eval_every": 1_000_000,  # at the end
        "trainer.layer_decay": 0.75 if init else 1.0,  # without pre-training there is nothing to be kept below
    }
    output = ["--output", str(folder / f"finetune {name}".replace(" ", "_"))]
    start = [] if init is None else ["--init", str(init)]
    command = ["finetune.py", "--deepspeed", str(DEEPSPEED), "--config", str(recipe), *output, *start]
    return Part(f"fine-tune {name}", command + flags(values))


def flags(values: dict[str, object]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def at_once() -> int:
    """How many parts to run at a time."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def run_side_by_side(chains: list[list[Part]], folder: Path, console: Console) -> None:
    """Run chains of parts, as many at once as there are cores; on a GPU, one after the other.

    Raises:
        RunError: a part failed; chains that are on their way end after the part they are at.
    """
    stop = threading.Event()

    def run_chain(chain: list[Part]) -> None:
        try:
            for part in chain:
                if not stop.is_set():
                    run_part(part, folder, console)
        except BaseException:  # a full disk, too
            stop.set()
            raise

    with ThreadPoolExecutor(at_once()) as pool:
        for done in as_completed([pool.submit(run_chain, chain) for chain in chains]):
            done.result()


def run_part(part: Part, folder: Path, console: Console) -> None:
    """Run a part to its end, unless it has been.

    Raises:
        RunError: it failed; names its log.
    """
    done, log = (folder / kind / f"{part.name}.{end}" for kind, end in (("done", "json"), ("logs", "log")))
    if done.is_file() and json.loads(done.read_text())["command"] == part.command:
        return
    for inside in ("done", "logs", "found"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    if part.produces:
        remove(part.produces)
    began = time.time()
    threads = {"OMP_NUM_THREADS": "1"} if at_once() > 1 else {}
    with log.open("w") as file:
        command = [sys.executable, str(RUN / part.command[0]), *part.command[1:]]
        status = subprocess.run(command, stdout=file, stderr=file, env=os.environ | threads)
    ended = time.time()
    if status.returncode:
        last = (log.read_text().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{part.name} ended with status {status.returncode}: {last} (all of it: {log})")
    fresh = done.with_suffix(".fresh")
    fresh.write_text(json.dumps({"command": part.command, "began": began, "ended": ended}))
    os.replace(fresh, done)
    console.say(f"{folder.name}: {part.name}, {ended - began:.0f} s")


def remove(path: Path) -> None:
    """What an interrupted part has left: a file, or a folder of files."""
    if path.is_dir():
        for inside in path.iterdir():
            inside.unlink()
    else:
        path.unlink(missing_ok=True)


# --- Results ----------------------------------------------------------------------------------------------


def introduction(options: Namespace, out: Path) -> str:
    """What was run, on what, when."""
    command = "python run/experiments.py" + " --quick" * options.quick
    command += " --openclipart FOLDER" * bool(options.openclipart)
    seconds = time_taken([json.loads(path.read_text()) for path in out.glob("*/done/*.json")])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "timm"))
    return (
        f"`{command}`, {date.today()}, {len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), {versions};"
        f" {seconds / 60:.0f} minutes in all. Accuracies in percent on test images that were never trained on; mean ±"
        " standard deviation over pre-training seeds, where there are several; images/s with a part on each core."
        " Settings were not tuned per objective."
    )


def time_taken(parts: list[dict]) -> float:
    """Seconds in which at least one part ran: pauses do not count, and parts side by side count once."""
    seconds, until = 0.0, 0.0
    for part in sorted(parts, key=lambda part: part["began"]):
        seconds += max(0.0, part["ended"] - max(part["began"], until))
        until = max(until, part["ended"])
    return seconds


def report(study: Study, folder: Path) -> str:
    """What a study found, as Markdown."""
    rows = []
    for objective in OBJECTIVES:
        names = [f"{objective} {seed}" for seed in range(study.seeds)]
        rates = [row["images_per_s"] for seed in range(study.seeds) for row in rates_of(folder, objective, seed)]
        rows.append(
            [
                objective,
                *frozen(folder, names),
                finetuned(folder, objective),
                f"{sorted(rates)[len(rates) // 2]:.0f}",
            ]
        )
    rows.append(["untrained", *frozen(folder, ["untrained"]), finetuned(folder, "untrained"), ""])
    rows.append(["raw pixels", *frozen(folder, ["raw pixels"]), "", ""])
    head = ["encoder", "linear probe, mean of patches", "linear probe, class token", "kNN (k = 20), mean of patches"]
    head += ["fine-tuned (one seed)", "pre-training images/s"]
    sizes = ", ".join(f"{name} {value}" for name, value in study.encoder.items())
    said = (
        f"**{study.kind}**: at most {study.images:,} images a split, {study.seeds} pre-training seed(s),"
        f" {study.samples:,} samples seen in each pre-training, {study.finetune_epochs} epoch(s) of fine-tuning;"
        f" encoder {sizes}."
    )
    return f"{said}\n\n{table(head, rows)}"


def rates_of(folder: Path, objective: str, seed: int) -> list[dict]:
    rows = read_rows(run_of(folder, objective, seed) / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "train"]


def frozen(folder: Path, names: list[str]) -> list[str]:
    """The cells of an encoder that was not trained on labels: two probes, and nearest neighbours."""
    wanted = (
        ("linear_probe", "", ("mean of patches", "pixels")),
        ("linear_probe", "", ("class token",)),
        ("knn", "k = 20", ("mean of patches", "pixels")),
    )
    cells = []
    for script, setting, features in wanted:
        found = [row for name in names for row in read_rows(folder / "found" / f"{name} {script}.jsonl")]
        fits = [row for row in found if row["setting"] == setting and row["feature"] in features]
        values = [value for row in fits for value in row["values"]]
        cells.append(spread(values) if values else "")
    return cells


def finetuned(folder: Path, name: str) -> str:
    rows = read_rows(folder / f"finetune {name}".replace(" ", "_") / "metrics.jsonl")
    return spread([[row for row in rows if row["kind"] == "eval"][-1]["accuracy/class"]])


if __name__ == "__main__":
    run_command(main)
