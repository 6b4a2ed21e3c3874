import os
import secrets

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes `device` is worth running on a GPU. Among workers, tests of the same kernels become neighbours.

    xdist's worksteal gives each worker a run of neighbours, so that one worker compiles a kernel and not all of them.
    Its loadgroup would say it more plainly, but xdist 3.8 groups nothing under pytest 9.2.
    """
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    if "PYTEST_XDIST_WORKER" in os.environ:
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), sizes_of(item)))


def sizes_of(item: pytest.Item) -> tuple[str, ...]:
    """What the kernels of a test are compiled for."""
    chosen = item.callspec.params if hasattr(item, "callspec") else {}
    return tuple(str(chosen[name]) for name in ("dtype", "D") if name in chosen)


@pytest.fixture
def device(mended_interpreter) -> str:
    """Where Triton runs: a GPU, or else its interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_seed() -> int:
    """Another one each time, printed so that a failure can be repeated."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed
