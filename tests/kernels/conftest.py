import secrets

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes `device` is worth running on a GPU."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device(monkeypatch) -> str:
    """Where Triton runs: a GPU, or else its interpreter, mended.

    Triton 3.6 and 3.7 turn a loop's bound, an array of one element, into an int; numpy 2.4 refuses that.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_seed() -> int:
    """Another one each time, printed so that a failure can be repeated."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed
