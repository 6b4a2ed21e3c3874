"""Training steps of MUG with its fused losses, and with the losses as they are first written down.

Each side runs alone, which yields its peak memory and its loss curve; then all take turns on one model, which yields
times that a machine of drifting speed slows alike. On a CPU each of these runs is a fresh process, as the peak memory
of a process cannot be taken back; on a GPU one process does them all.

    python -m mug.run.benchmarks.model_step '{"paths": ["fused"], "preset": "tiny", ...}'   # one such process
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mug.model.activation_checkpointing import activation_checkpointing
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Batch, Context
from mug.model.presets import resolve
from mug.run.benchmarks.fresh_process import in_a_process, peak_mb
from mug.run.benchmarks.kernel_ops import every_patch_loss
from mug.run.benchmarks.synthetic import VOCABULARY, WEIGHTS, synthetic_batch

LEARNING_RATE = 1e-4
WARM_UPS = 1  # turns that are not timed
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of the curves, relative: fp32, and bf16 where no sum has a fixed order


def fused_losses(model: MUG, batch: Batch) -> dict[str, Tensor]:
    return model(batch)[0]


def naive_losses(model: MUG, batch: Batch) -> dict[str, Tensor]:
    """MUG with the target of every patch and the logits of every token, padding included."""
    image, tokens, position = batch["image"], batch["tokens"], batch["position"]
    visible_BK, masked_BM = model.mask(position)
    encoded_BLD = model.encoder(image, visible_BK)
    prediction_BMP = model.pixel_decoder(encoded_BLD, visible_BK, masked_BM)
    pixels = every_patch_loss(image, prediction_BMP, masked_BM, patch_size=model.config.patch_size)
    task = model.captioning(tokens, position, model.vocabulary, model.seed)
    logits_BTV = model.text_decoder.head(model.text_decoder(task.inputs, encoded_BLD))
    pad = model.vocabulary.pad
    caption = F.cross_entropy(logits_BTV.float().flatten(0, 1), task.targets.flatten(), ignore_index=pad)
    return {"pixels": pixels, "caption": caption}


# The losses of each side, and what its backward computes again.
PATHS: dict[str, tuple[Callable[[MUG, Batch], dict[str, Tensor]], str]] = {
    "naive": (naive_losses, "none"),
    "fused": (fused_losses, "none"),
    "activation_checkpointing": (fused_losses, "elementwise"),
}
NAMES = {
    "naive": "naive",
    "fused": "fused",
    "activation_checkpointing": "fused, with trainer.activation_checkpointing elementwise",
}


def compare_steps(preset: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Returns peak memory, time and loss curves of all sides, as one row of metrics; the naive side is the baseline."""
    options = {"preset": preset, "batch": batch, "steps": steps, "device": device}
    alone = {path: _run([path], options) for path in PATHS}
    turns = _run(list(PATHS), options)
    row = {"kind": "model_step", **options, "device": alone["fused"]["device"], "torch": torch.__version__}
    for path in PATHS:
        row[f"{path}_peak_mb"] = alone[path]["peak_mb"]
        row[f"{path}_before_mb"] = alone[path]["before_mb"]
        row[f"{path}_ms"] = 1e3 * statistics.median(turns["seconds"][path])
        row[f"{path}_saving"] = 1 - row[f"{path}_peak_mb"] / row["naive_peak_mb"]
        ratios = [a / b for a, b in zip(turns["seconds"][path], turns["seconds"]["naive"], strict=True)]
        row[f"{path}_time_ratio"] = statistics.median(ratios)
    differences = [
        abs(ours[term] - naive[term]) / abs(naive[term])
        for path in PATHS
        for ours, naive in zip(alone[path]["losses"][path], alone["naive"]["losses"]["naive"], strict=True)
        for term in WEIGHTS
    ]
    # Not Python's max, which passes over NaN.
    return {**row, "largest_loss_difference": torch.tensor(differences).max().item(), "tolerance": TOLERANCE[device]}


def describe(row: dict[str, Any]) -> Iterator[str]:
    """Yields the row in words."""
    yield f"model_step: {row['preset']}, batch {row['batch']}, {row['device']}, PyTorch {row['torch']}"
    for path in PATHS:
        peak, before = row[f"{path}_peak_mb"], row[f"{path}_before_mb"]
        line = f"{NAMES[path]}: peak {peak:.0f} MB, of which {before:.0f} MB before the first step"
        saving, ratio = 100 * row[f"{path}_saving"], row[f"{path}_time_ratio"]
        than_naive = "" if path == "naive" else f"; {saving:.1f}% less peak memory, {ratio:.3f} of the time"
        yield f"{line}; {row[f'{path}_ms']:.0f} ms{than_naive}"
    yield (
        f"median of {row['steps']} turns; losses of {row['steps'] + WARM_UPS} steps differ by at most"
        f" {row['largest_loss_difference']:.1e}"
    )


def _run(paths: list[str], options: dict[str, Any]) -> dict[str, Any]:
    if options["device"] == "cpu":
        return in_a_process(__name__, " and ".join(paths), paths=paths, **options)
    return run_steps(paths=paths, **options)


def run_steps(paths: list[str], preset: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Run steps of the paths in turn, on one model; each turn has a batch of its own."""
    config = resolve(MUGConfig(preset))
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        model = MUG(config, Context(vocabulary=VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    losses: dict[str, list[dict[str, float]]] = {path: [] for path in paths}
    before = peak_mb(device)
    for turn in range(WARM_UPS + steps):
        samples = {name: x.to(device) for name, x in synthetic_batch(config, VOCABULARY, batch, seed=turn).items()}
        for path in paths:
            begin = time.perf_counter()
            losses_of, again = PATHS[path]
            activation_checkpointing(model, again)
            metrics = _step(losses_of, model, optimizer, samples)
            losses[path].append({term: loss.item() for term, loss in metrics.items()})  # waits for a GPU
            if turn >= WARM_UPS:
                seconds[path].append(time.perf_counter() - begin)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"before_mb": before, "peak_mb": peak_mb(device), "seconds": seconds, "losses": losses, "device": name}


def _step(losses_of: Callable, model: MUG, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, Tensor]:
    kind = batch["image"].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        losses = losses_of(model, batch)
    sum(WEIGHTS[term] * loss for term, loss in losses.items()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {term: loss.detach() for term, loss in losses.items()}


if __name__ == "__main__":
    print(json.dumps(run_steps(**json.loads(sys.argv[1]))))
