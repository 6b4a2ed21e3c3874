import subprocess
import sys

import pytest

from mug.data.config import DataConfig
from mug.data.errors import DataError


@pytest.mark.parametrize("scale", [(0, 1), (0.5, 0.2), (0.2, 1.5)])
def test_a_wrong_crop_scale_is_refused(scale):
    with pytest.raises(DataError, match="crop_scale"):
        DataConfig(crop_scale=scale)


def test_negative_workers_are_refused():
    with pytest.raises(DataError, match="workers"):
        DataConfig(workers=-1)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("MUG_CACHE", raising=False)
    assert str(DataConfig().cache_folder()) == "/home/someone/.cache/mug"
    monkeypatch.setenv("MUG_CACHE", str(tmp_path))
    assert DataConfig().cache_folder() == tmp_path
    assert str(DataConfig(cache="~/here").cache_folder()) == "/home/someone/here"


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, mug.data.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
