"""Random numbers keyed by what they are for, so that no rank, worker or restart can change them."""

import threading

import numpy as np

ORDER, CROP, FLIP, CAPTION, SUBSTITUTE, AUGMENT, MIX, SCENE, MIXTURE = range(9)  # purposes: each has its own stream


class _Generator(threading.local):
    """A thread's Philox, and the state that it begins with; a new one costs four times as much as a new state."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state = self.philox.state


_generator = _Generator()


def raw(seed: int, purpose: int, epoch: int, position: int, count: int, view: int = 0) -> np.ndarray:
    """Returns `count` random uint64, a pure function of the other arguments; `view` numbers the views of one sample.

    They come directly from Philox, not through `Generator`: numpy keeps only the former stable over versions.
    """
    state = _generator.state["state"]
    state["counter"] = np.array([0, view, position, epoch], dtype=np.uint64)
    state["key"] = np.array([seed, purpose], dtype=np.uint64)
    _generator.philox.state = _generator.state
    return _generator.philox.random_raw(count)


def uniform(seed: int, purpose: int, epoch: int, position: int, count: int, view: int = 0) -> np.ndarray:
    """Returns `count` float64 in [0, 1), a pure function of the other arguments."""
    return (raw(seed, purpose, epoch, position, count, view) >> np.uint64(11)) * 2.0**-53
