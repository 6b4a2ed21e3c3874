"""One run through many faults, drawn by a seed; afterwards it is what an undisturbed run is.

    python tests/end_to_end/chaos.py --faults 50

About 15 s a fault on 2 cores. As root it also fills a disk and cuts a network (apt packages: see hosts.py).
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from hosts import INTERFACE, cluster, lacking
from launch import BIN, PYTHON, ROOT, TOY, deepspeed, environment, losses, pretrain, rows, torchrun

from mug.data.builders.openmoji import ensure_openmoji
from mug.data.config import DataConfig

BATCH, EVERY = 8, 3
PATIENCE = 600  # seconds in which a life must come to its end, or to the place where it is disturbed
HOOK = Path(__file__).parent / "chaos_hook"

# Just before which file operation of a save a rank is killed.
PHASES = {
    "opening a shard": r"^open \S*\.partial/(weight|exp_avg|exp_avg_sq)-",
    "sealing the manifest": r"^open \S*\.partial/manifest\.json\.fresh",
    "placing the manifest": r"^os\.rename \S*manifest\.json\.fresh",
    "naming the checkpoint": r"^os\.rename \S*checkpoint-\d+\.partial \S*checkpoint-\d+$",
    "writing latest": r"^open \S*latest\.fresh",
    "replacing latest": r"^os\.rename \S*latest\.fresh",
    "taking an old one away": r"^os\.rename \S*checkpoint-\d+ \S*checkpoint-\d+\.partial",
    "removing an old one": r"^os\.remove (weight|exp_avg|exp_avg_sq)-",
    "rewriting the metrics": r"^os\.rename \S*metrics\.fresh",
}


# --- Lives ------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """The run from one start to one end."""

    process: subprocess.Popen
    said: Path
    output: Path
    known: dict[int, psutil.Process] = field(default_factory=dict)

    def tree(self) -> list[psutil.Process]:
        """The launcher, then what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            self.known |= {process.pid: process for process in [root, *root.children(recursive=True)]}
        return [process for process in self.known.values() if _alive(process)]

    def ranks(self) -> list[psutil.Process]:
        return [one for one in self.tree() if is_rank(one)]

    def workers(self) -> list[psutil.Process]:
        """Data workers: forks of a server that a rank has started; without that server the run would continue."""
        return [one for one in self.tree() if any(is_rank(parent) for parent in _parents(one)[1:]) and not is_rank(one)]

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def wait_until(self, reached: Callable[[], object]) -> None:
        """Until `reached()`; the life must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            self.tree()
            assert self.process.poll() is None, f"ended before it could be disturbed:\n{self.text()}"
            assert time.monotonic() < deadline, f"did not get there:\n{self.text()}"
            time.sleep(0.005)

    def end(self) -> int:
        """Wait for the end, and take away what a killed launcher has left, as a scheduler does."""
        try:
            status = self.process.wait(PATIENCE)
        finally:
            for left in self.tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            self.process.wait()
            psutil.wait_procs(list(self.known.values()), timeout=30)
        return status


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def is_rank(process: psutil.Process) -> bool:
    """Whether it runs run/pretrain.py itself; launchers have that further on in their command."""
    return "run/pretrain.py" in _command(process)[1:3]


def _parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


@dataclass
class Soak:
    """The run, what it has been through, and what to draw the next fault with."""

    folder: Path
    random: random.Random
    steps: int
    lives: int = 0
    counts: Counter = field(default_factory=Counter)
    life: Life | None = None  # the newest
    expected: int | None = None  # the step after which it must resume

    def close(self) -> None:
        """End what a failed test has left."""
        if self.life:
            self.life.process.kill()
            self.life.end()

    @property
    def output(self) -> Path:
        return self.folder / "disk" / "run"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def options(self, workers: int = 0) -> list[str]:
        own = {
            "data.tokenizer": f"{self.shards}/tokenizer.json",
            "data.cache": str(self.folder / "cache"),
            "data.workers": str(workers),
            "trainer.max_steps": str(self.steps),
            "checkpoint.every_steps": str(EVERY),
            "checkpoint.keep": "2",
            "checkpoint.asynchronous": str(self.random.random() < 0.3).lower(),
        }
        return [
            "--config",
            str(self.folder / "recipe.yaml"),
            *TOY,
            *(part for name, value in own.items() for part in (f"--{name}", value)),
        ]

    def start(self, launcher: list[str] | None = None, workers: int = 0, **variables: str) -> Life:
        """Start the run again, on one or two ranks, in any ZeRO stage; it must resume from the newest intact state."""
        drawn = self.random.choice([PYTHON] * 4 + [torchrun(2), deepspeed(2)])
        config = f"ds_configs/zero{self.random.choice([1, 2, 3])}.json"
        command = [*(launcher or drawn), "run/pretrain.py", "--deepspeed", config, "--output", str(self.output)]
        self.lives += 1
        said = self.folder / "lives" / f"{self.lives}.log"
        said.parent.mkdir(exist_ok=True)
        with said.open("w") as log:
            process = subprocess.Popen(
                [*command, *self.options(workers)],
                cwd=ROOT,
                env=environment() | variables,
                stdout=log,
                stderr=log,
            )
        self.life = Life(process, said, self.output)
        self.expected = newest_whole(self.output)
        return self.life

    def came_to_life(self, life: Life) -> bool:
        """Whether the run has begun to train in this life; if so, from where it should have."""
        if not (begun := re.search(r"^(?:host\d: )?batch \d+ = ", life.text(), re.M)):
            return False
        if self.expected is None:
            assert "resuming after step" not in life.text()
            return True
        if not (went_on := re.search(r"resuming after step (\d+) from \S+checkpoint-(\d+)$", life.text(), re.M)):
            return False
        assert begun and went_on[1] == went_on[2] == str(self.expected), life.text()
        return True

    def train(self, life: Life, steps: int) -> None:
        """Let the life train so many steps."""
        life.wait_until(lambda: self.came_to_life(life))
        first = (self.expected or 0) + steps
        life.wait_until(lambda: f"\nstep {first} " in life.text() or f": step {first} " in life.text())

    def until_saved(self, life: Life) -> None:
        """Let the life train until it has committed a checkpoint, then ask it to end."""
        life.wait_until(lambda: self.came_to_life(life))
        before = (self.output / "latest").read_text()
        life.wait_until(lambda: (self.output / "latest").read_text() != before)
        life.process.send_signal(signal.SIGTERM)
        assert life.end() != 0


# --- What must be true ------------------------------------------------------------------------------------


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are those of its manifest, and that is as written; not by the code under test."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, checksum = manifest["files"], manifest.pop("sha256")
        sealed = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() == checksum
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
        return sealed and all(digests[name] == file["sha256"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def newest_whole(output: Path) -> int | None:
    return next((_step(folder) for folder in checkpoints(output) if is_whole(folder)), None)


def assert_all_whole(output: Path) -> None:
    """Every checkpoint that has its name is whole, and `latest` names one."""
    assert all(map(is_whole, checkpoints(output))), [str(path) for path in checkpoints(output)]
    if (output / "latest").exists():
        assert is_whole(output / (output / "latest").read_text())


# --- Faults -----------------------------------------------------------------------------------------------


def kill(soak: Soak, life: Life, process: psutil.Process) -> None:
    process.kill()
    assert life.end() != 0


def kill_while_starting(soak: Soak) -> None:
    life = soak.start()
    time.sleep(soak.random.uniform(0, 10))
    kill(soak, life, soak.random.choice(life.tree()))


def kill_a_rank(soak: Soak) -> None:
    life = soak.start()
    soak.train(life, soak.random.randint(1, 5))
    kill(soak, life, soak.random.choice(life.ranks()))


def kill_the_launcher(soak: Soak) -> None:
    """Its ranks notice, save and end; another start meanwhile is refused."""
    life = soak.start(soak.random.choice([torchrun(2), deepspeed(2)]))
    soak.train(life, 1)
    life.process.kill()
    all_ranks_end(life)
    assert life.end() != 0


def all_ranks_end(life: Life) -> None:
    """By themselves."""
    deadline = time.monotonic() + PATIENCE
    while life.ranks():
        assert time.monotonic() < deadline, f"ranks hang:\n{life.text()}"
        time.sleep(0.5)


def kill_a_data_worker(soak: Soak) -> None:
    life = soak.start(workers=1)
    soak.train(life, soak.random.randint(1, 3))
    kill(soak, life, soak.random.choice(life.workers()))


def kill_during_a_save(soak: Soak) -> None:
    life = soak.start()
    life.wait_until(lambda: soak.came_to_life(life))
    life.wait_until(lambda: list(soak.output.glob("*.partial")))
    time.sleep(soak.random.uniform(0, 0.05))
    kill(soak, life, soak.random.choice(life.ranks()))


def kill_just_before(phase: str) -> Callable[[Soak], None]:
    def fault(soak: Soak) -> None:
        path = f"{HOOK}:{os.environ.get('PYTHONPATH', '')}"
        life = soak.start(PYTHON if "metrics" in phase else None, CHAOS_AT=PHASES[phase], PYTHONPATH=path)
        assert life.end() != 0, life.text()

    return fault


def sigterm_to_a_rank(soak: Soak) -> None:
    life = soak.start()
    soak.train(life, soak.random.randint(1, 4))
    soak.random.choice(life.ranks()).terminate()
    assert life.end() != 0


def sigterm_to_the_launcher(soak: Soak) -> None:
    life = soak.start()
    soak.train(life, soak.random.randint(1, 4))
    life.process.terminate()
    assert life.end() != 0


def full_disk(soak: Soak) -> None:
    """On a disk of our own, room for half of a checkpoint's first file; what an old one leaves is filled as well."""
    life = soak.start()
    life.wait_until(lambda: soak.came_to_life(life))
    ballast, deadline = soak.folder / "disk" / "ballast", time.monotonic() + PATIENCE
    try:
        with ballast.open("ab", buffering=0) as file:
            while life.process.poll() is None:
                assert time.monotonic() < deadline, f"continues without disk space:\n{life.text()}"
                disk = os.statvfs(ballast.parent)
                with contextlib.suppress(OSError):
                    file.write(b"\0" * max(0, disk.f_bavail * disk.f_bsize - 300_000))
                time.sleep(0.02)
        assert life.end() != 0
        assert "No space left" in life.text()
    finally:
        ballast.unlink()


def damage(change: Callable[[Soak, bytearray], None], which: str) -> Callable[[Soak], None]:
    """Damage a file of the newest checkpoint: it is named, and the one before is taken."""

    def fault(soak: Soak) -> None:
        folder = checkpoints(soak.output)[0]
        path = soak.random.choice(sorted(folder.glob(which)))
        before = path.read_bytes()
        while is_whole(folder):  # 1e-05 and 1E-05 are one number
            change(soak, data := bytearray(before))
            path.write_bytes(data)
        life = soak.start()
        assert soak.expected == _step(checkpoints(soak.output)[1]), f"{path} is damaged"
        soak.until_saved(life)
        assert re.search(rf"warning: \S*{folder.name}: {re.escape(path.name)}", life.text()), life.text()

    return fault


def truncate(soak: Soak, data: bytearray) -> None:
    del data[soak.random.randrange(len(data)) :]


def flip_a_bit(soak: Soak, data: bytearray) -> None:
    data[soak.random.randrange(len(data))] ^= 1 << soak.random.randrange(8)


def replace_a_shard(soak: Soak) -> None:
    """Two shards of the training data change places: refused until they are put back."""
    first, second = soak.random.sample(sorted(soak.shards.glob("train-*.tar")), 2)
    aside = soak.shards / "aside"

    def swap() -> None:
        first.rename(aside)
        second.rename(first)
        aside.rename(second)

    swap()
    try:
        life = soak.start(PYTHON)
        assert life.end() == 2
        assert "the checkpoint's data has fingerprint" in life.text(), life.text()
    finally:
        swap()


def cut_the_network(soak: Soak) -> None:
    """Two hosts lose each other: the ranks of both end by themselves."""
    with tempfile.TemporaryDirectory() as folder, cluster(2, Path(folder) / "cluster") as made:
        (Path(folder) / "env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n")
        launcher = [str(BIN / "deepspeed"), "--hostfile", str(made.hostfile)]
        life = soak.start(made.hosts[0].command(launcher), DS_ENV_FILE=f"{folder}/env")
        soak.train(life, 2)
        made.plug(1, up=False)
        all_ranks_end(life)
        assert life.end() != 0


def faults(disk_to_fill: bool) -> dict[str, Callable[[Soak], None]]:
    """By name, those that can be made here."""
    named = {
        "SIGKILL while starting": kill_while_starting,
        "SIGKILL of a rank": kill_a_rank,
        "SIGKILL of the launcher": kill_the_launcher,
        "SIGKILL of a data worker": kill_a_data_worker,
        "SIGKILL during a save": kill_during_a_save,
        **{f"SIGKILL before {phase}": kill_just_before(phase) for phase in PHASES},
        "SIGTERM to a rank": sigterm_to_a_rank,
        "SIGTERM to the launcher": sigterm_to_the_launcher,
        "truncated checkpoint file": damage(truncate, "*.safetensors"),
        "bit flipped in a checkpoint file": damage(flip_a_bit, "*.safetensors"),
        "bit flipped in a manifest": damage(flip_a_bit, "manifest.json"),
        "training shard replaced": replace_a_shard,
    }
    if disk_to_fill:
        named["disk full while saving"] = full_disk
    if lacking() is None:
        named["network cut between hosts"] = cut_the_network
    return named


# --- The soak ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 64 MB at `folder`, to be filled; False where it is only a folder, for want of rights."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def soak(folder: Path, number: int, seed: int, say: Callable[[str], None] = print) -> Counter:
    """Put one run through `number` faults in `folder`, and compare it with one that had none; returns their counts."""
    run = Soak(folder, random.Random(seed), steps=5 * number + 16)
    shutil.copytree(ensure_openmoji(DataConfig().cache_folder()), run.shards)
    recipe = yaml.safe_load((ROOT / "run/recipes/mug/openmoji_tiny.yaml").read_text())
    recipe["data"]["shards"] = f"{run.shards}/train-*.tar"  # here, because ssh would expand it on a command line
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with small_disk(folder / "disk") as to_fill, contextlib.closing(run):
        finish_life(run, run.start(PYTHON), first=True)
        possible, queue = faults(to_fill), []
        for count in range(1, number + 1):
            queue = queue or run.random.sample(sorted(possible), len(possible))
            name = queue.pop()
            begin = time.monotonic()
            possible[name](run)
            assert_all_whole(run.output)
            run.counts[name] += 1
            say(f"{count:3} {name}: step {newest_whole(run.output)}, {time.monotonic() - begin:.0f} s")
        finish_life(run, run.start(PYTHON))
        compare(run)
    return run.counts


def finish_life(run: Soak, life: Life, first: bool = False) -> None:
    """Without a fault: the first two checkpoints, or all the rest."""
    if first:
        life.wait_until(lambda: (newest_whole(run.output) or 0) >= 2 * EVERY)
        life.process.terminate()
        assert life.end() != 0
        return
    life.wait_until(lambda: run.came_to_life(life))
    assert life.process.wait() == 0, life.text()


def compare(run: Soak) -> None:
    """With a run that nothing has disturbed: every position once, in order, and the same losses."""
    reference = run.folder / "undisturbed"
    done = pretrain(reference, *run.options())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["position"] for row in rows(run.output, "train")] == [BATCH * (i + 1) for i in range(run.steps)]
    for mine, other in zip(losses(run.output), losses(reference), strict=True):
        for name in ("loss/total", "loss/pixels", "loss/caption"):
            assert abs(mine[name] - other[name]) < 1e-3, (mine, other)
    assert_all_whole(run.output)
    manifest = json.loads((run.output / f"checkpoint-{run.steps}" / "manifest.json").read_text())
    assert manifest["data"]["next_position"] == BATCH * run.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(Path(folder), arguments.faults, arguments.seed)
    for name, count in sorted(counts.items()):
        print(f"{count:4}  {name}")
    print(f"{counts.total():4}  faults; the run is complete, and what an undisturbed one is")


if __name__ == "__main__":
    sys.exit(main())
