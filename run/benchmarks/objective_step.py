"""Training steps of an objective and of its peer, on the same batch.

Each side runs alone, in a process of its own, which yields its memory; then both take turns in one process, which
yields ratios that a machine of drifting speed leaves alone. Times are the CPU's: another process does not add to them.

    python -m mug.run.benchmarks.objective_step '{"sides": ["ours"], "objective": "clip", ...}'   # one such process
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mug.model.objectives.objective import Batch, Context, Objective, find_objective, name_of
from mug.model.presets import PRESETS, Vocabulary, resolve
from mug.run.benchmarks.fresh_process import in_a_process, peak_mb
from mug.run.benchmarks.one_rank import WORDS
from mug.run.benchmarks.peers import PEERS, normalized
from mug.run.benchmarks.synthetic import full_batch
from mug.run.common.packages import load_package

WARM_UPS = 1  # turns that are not timed
LEARNING_RATE = 1e-4


def compare_with_peer(objective: str, preset: str, batch: int, pairs: int) -> dict[str, Any]:
    """Returns memory and time of both sides, as one row of metrics; a ratio is ours over the peer's.

    Raises:
        RunError: the peer's package is not installed.
    """
    package = PEERS[objective].package
    version = load_package(package, "bench").__version__
    options = {"objective": objective, "preset": preset, "batch": batch}
    alone = {side: _run([side], pairs=1, **options) for side in STEPS}
    turns = _run(list(STEPS), pairs=pairs, **options)
    ours, peer = (turns["seconds"][side] for side in STEPS)
    ratio, low, high = median_interval([a / b for a, b in zip(ours, peer, strict=True)])
    row: dict[str, Any] = {"kind": "objective_step", **options, "pairs": pairs, "peer": f"{package} {version}"}
    row |= {"ratio": ratio, "low": low, "high": high, "gflops_per_image": turns["flops"] / 1e9}
    for side in STEPS:
        row[f"{side}_ms"] = 1e3 * statistics.median(turns["seconds"][side])
        row[f"{side}_mb"] = alone[side]["mb"]
    return row | {"images_per_s": 1e3 * batch / row["ours_ms"], "memory_ratio": row["ours_mb"] / row["peer_mb"]}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Returns (median, low, high) of the interval between two of the values that covers the true median, whatever their
    distribution; of fewer than 6 values, which cannot with 95%, their min and max."""
    ordered, n = sorted(values), len(values)
    missed = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]
    k = max((k for k, chance in enumerate(missed) if chance <= 1 - confidence), default=0)
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def describe(row: dict[str, Any]) -> str:
    """Returns the row in one line."""
    return (
        f"{row['objective']} {row['preset']}, batch {row['batch']}: {row['ratio']:.3f} of the time of {row['peer']}"
        f" ({row['low']:.3f} to {row['high']:.3f}, {row['pairs']} pairs; {row['ours_ms']:.0f} and {row['peer_ms']:.0f}"
        f" ms), {row['memory_ratio']:.3f} of its memory ({row['ours_mb']:.0f} and {row['peer_mb']:.0f} MB);"
        f" {row['images_per_s']:.1f} images/s, {row['gflops_per_image']:.2f} GFLOP an image"
    )


def _run(sides: list[str], **options: Any) -> dict[str, Any]:
    label = f"{options['objective']}, {' and '.join(sides)},"
    return in_a_process(__name__, label, sides=sides, **options)


def run_steps(sides: list[str], objective: str, preset: str, batch: int, pairs: int) -> dict[str, Any]:
    """Returns the CPU seconds of each side's steps, in turn, their memory, and the FLOP of a sample."""
    torch.manual_seed(0)
    ours = build_ours(objective, preset)
    samples = full_batch(ours, batch)
    steps = {side: STEPS[side](ours, samples) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    before = psutil.Process().memory_info().rss / 1e6
    for turn in range(WARM_UPS + pairs):
        for side in sides[:: 1 if turn % 2 else -1]:  # neither is always the first
            begin = time.process_time()
            steps[side]()
            if turn >= WARM_UPS:
                seconds[side].append(time.process_time() - begin)
    return {"seconds": seconds, "mb": peak_mb("cpu") - before, "flops": ours.flops(samples) / batch}


def build_ours(objective: str, preset: str) -> Objective:
    """Returns the objective in the preset's sizes, tied as the peer ties them."""
    found, sizes = find_objective(objective), PRESETS[preset]
    alike = {name: sizes[other] for name, other in PEERS[objective].alike}
    vocabulary = Vocabulary(WORDS.get(preset, 30522), pad=0, bos=1, eos=2, mask=3)
    return found(resolve(found.Config(preset, **alike)), Context(vocabulary=vocabulary))


def our_step(model: Objective, batch: Batch) -> Callable[[], None]:
    prepared = model.prepare(batch)

    def loss() -> Tensor:
        losses, _ = model(prepared)
        return torch.stack([model.losses[name] * value for name, value in losses.items()]).sum()

    return _step(model, loss)


def peer_step(ours: Objective, batch: Batch) -> Callable[[], None]:
    vocabulary = ours.context.vocabulary
    assert vocabulary is not None  # build_ours gives it one
    model = PEERS[name_of(type(ours))].build(ours.config, vocabulary)
    if "image" in batch:
        batch = batch | {"pixels": normalized(batch["image"].float() / 255)}
    return _step(model, lambda: model(batch))


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Returns forward, backward and AdamW as one function."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS = {"ours": our_step, "peer": peer_step}


if __name__ == "__main__":
    print(json.dumps(run_steps(**json.loads(sys.argv[1]))))
