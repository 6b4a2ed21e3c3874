"""What `make demo` and `make test` check before they set anything up, and how uv follows pip's settings."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "set_up.py"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def set_up():
    spec = importlib.util.spec_from_file_location("set_up", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_can_read_it():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("version", "found", "line"),
    [
        ((3, 9), ["python3.12"], "Python 3.9 is too old, 3.11 or 3.12 is needed: make PYTHON=python3.12"),
        ((3, 10), [], "Python 3.10 is too old, 3.11 or 3.12 is needed: install one, and make PYTHON=python3.12"),
        ((3, 11), [], None),
        ((3, 12), [], None),
        ((3, 13), [], None),
    ],
)
def test_python_is_checked(set_up, monkeypatch, capsys, version, found, line):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: name if name in found else None)
    assert set_up.python_problem(version) == line
    assert ("3.13 has not been tested" in capsys.readouterr().out) == (version == (3, 13))


def test_a_python_without_venv_is_one_line(set_up, monkeypatch):
    monkeypatch.setattr(set_up.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    assert set_up.python_problem().startswith("this Python has no module ensurepip: apt install python3-venv")


def test_a_full_disk_is_one_line_until_all_is_installed(set_up, monkeypatch, tmp_path):
    monkeypatch.setattr(set_up, "memory_gb", lambda: 100.0)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "small"))
    (tmp_path / "small").mkdir()
    free = {tmp_path: 8.5, tmp_path / "small": 3.5}
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda folder: Usage(0, 0, free[Path(folder)] * 1e9))
    assert set_up.problem(tmp_path / "venv").startswith(f"{tmp_path}/small has 3.5 GB of free disk space, 4 are needed")
    free[tmp_path] = 7.5
    assert set_up.problem(tmp_path / "venv").startswith(f"{tmp_path} has 7.5 GB of free disk space, 8 are needed: ")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".ready").touch()
    assert set_up.problem(tmp_path / "venv") is None


def test_memory_is_what_is_free_and_allowed(set_up, tmp_path):
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    info.write_text("MemFree: 100 kB\nMemAvailable:  5000000 kB\nSwapFree:  2000000 kB\nHugePages_Total: 0\n")
    assert set_up.memory_gb(info, limit) == pytest.approx(7.168)
    limit.write_text("max\n")
    assert set_up.memory_gb(info, limit) == pytest.approx(7.168)
    limit.write_text("3000000000\n")
    assert set_up.memory_gb(info, limit) == 3.0
    assert set_up.memory_gb(tmp_path / "none", limit) is None


def test_little_memory_is_one_line(set_up, monkeypatch, tmp_path, capsys):
    (tmp_path / ".ready").touch()
    monkeypatch.setattr(set_up, "memory_gb", lambda: 3.9)
    with pytest.raises(SystemExit, match=r"^2$"):
        set_up.main(["check", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: 3.9 GB of memory and swap are free, 4 are needed: ")


def test_uv_follows_pips_files_and_variables(set_up, tmp_path, monkeypatch):
    """Variables of pip come before its files, as pip has it; `install` before `global`."""
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://file/simple\nproxy = http://proxy:3128\ncert = /ca.pem\n"
        f"extra-index-url = file://{tmp_path}/none file://{tmp_path}\n    https://more/simple\n"
        "[install]\ntrusted-host = more\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    found = set_up.uv_variables(set_up.pip_settings(sys.executable))
    assert {name: found[name] for name in found if name != "UV_INDEX_STRATEGY"} == {
        "UV_DEFAULT_INDEX": "https://variable/simple",
        "UV_INDEX": f"file://{tmp_path} https://more/simple",
        "UV_FIND_LINKS": "/a,/b",
        "UV_INSECURE_HOST": "more",
        "SSL_CERT_FILE": "/ca.pem",
        "HTTPS_PROXY": "http://proxy:3128",
        "HTTP_PROXY": "http://proxy:3128",
    }


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_refuses_a_missing_python(tmp_path):
    command = ["make", "-C", ROOT, "check", "PYTHON=python3.none", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: python3.none is not installed: install Python 3.11")


def test_what_uv_cannot_install_pip_does(set_up, tmp_path, capsys):
    """Which is said; and where neither can, one line says what failed."""
    done = tmp_path / "done"
    set_up.run(["false"], ["touch", str(done)])
    assert done.is_file()
    assert capsys.readouterr().out == f"false failed, as it says above: trying touch {done}\n"
    set_up.run(["true"], ["false"])
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^set-up failed at: false twice; behind a proxy set HTTPS_PROXY"):
        set_up.run(["false", "once"], ["false", "twice"])


def test_there_may_be_no_uv_for_this_machine(set_up, tmp_path, capsys):
    assert set_up.fetch_uv(tmp_path, ["false"]) is None
    assert capsys.readouterr().out == "no uv could be fetched for this machine: pip takes some minutes more\n"
    assert set_up.fetch_uv(tmp_path, ["true"]) == str(tmp_path / "bin" / "uv")
