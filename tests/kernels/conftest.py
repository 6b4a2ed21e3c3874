import secrets

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes `device` is worth running on a GPU."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device() -> str:
    """Where Triton runs: a GPU, or else its interpreter."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_seed() -> int:
    """Another one each time, printed so that a failure can be repeated."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed
