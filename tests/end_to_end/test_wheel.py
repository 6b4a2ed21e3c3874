"""The built wheel, installed where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from launch import ROOT, TOY
from PIL import Image

IMPORT_ALL, RUN_CODE = (Path(__file__).with_name(name) for name in ("import_all.py", "run_code.py"))
OPTIONS = {name.removeprefix("--"): value for name, value in zip(TOY[::2], TOY[1::2], strict=True)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and else what this one has but for the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # builds leave files that a later build would pick up
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "wheels", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "-q", "install", "--no-deps", "--ignore-installed", wheel], check=True)
    return python.parent


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_module_imports(tmp_path, installed):
    done = run(tmp_path, installed / "python", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    count, place = done.stdout.splitlines()[-1].split(" modules in ")  # DeepSpeed prints before it
    assert int(count) > 100
    assert Path(place.strip()).is_relative_to(installed.parent)


@pytest.mark.slow
def test_every_command_answers(tmp_path, installed):
    commands = sorted(path for path in installed.iterdir() if path.name.startswith("mug-"))
    assert {"mug-pretrain", "mug-finetune", "mug-generate", "mug-export"} <= {path.name for path in commands}
    done = run(tmp_path, installed / "mug-pretrain", "--help")
    assert done.returncode == 0 and "--trainer.precision" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_embedded_default_trains(tmp_path, installed):
    options = [*TOY, "--data.workers", "2", "--trainer.max_steps", "5", "--output", "run"]
    done = run(tmp_path, installed / "mug-pretrain", "--deepspeed", "ds_configs/zero3.json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, installed):
    options = f"OPTIONS={OPTIONS | {'data.workers': '1'}}"
    done = run(
        tmp_path, installed / "python", RUN_CODE, ROOT / "docs" / "mug.ipynb", "STEPS=3", "STEPS_OF_OURS=3", options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" is nearest to ") == 6 and "mug.ipynb: 8 cells" in done.stdout
    manifest = json.loads((tmp_path / "runs" / "notebook" / "checkpoint-3" / "manifest.json").read_text())
    assert manifest["recipe"]["data"]["embedded"] == "compositions", "other pairs than those that are shown"


@pytest.mark.slow
def test_the_lines_of_the_documentation_run(tmp_path, installed):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    few = text.replace('{"trainer.max_steps": 200}', str(OPTIONS | {"trainer.max_steps": 2}))
    assert few != text
    (tmp_path / "python.md").write_text(few, encoding="utf-8")
    for name, color in (("cat.jpg", "orange"), ("dog.png", "white")):
        Image.new("RGB", (90, 60), color).save(tmp_path / name)
    done = run(tmp_path, installed / "python", RUN_CODE, "python.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensor(" in done.stdout.splitlines()[-2]
