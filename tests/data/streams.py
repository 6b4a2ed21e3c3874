"""What streams of pairs give, by rank and by all ranks together."""

import itertools
import json
from collections.abc import Callable

from mug.data.stream import TrainStream


def rows(batch: dict) -> list[tuple]:
    """(position, image, tokens) of each sample of a batch, in order."""
    columns = batch["position"].tolist(), batch["image"].numpy(), batch["tokens"].tolist()
    return [(position, image.tobytes(), tuple(tokens)) for position, image, tokens in zip(*columns, strict=True)]


def take(stream: TrainStream, steps: int) -> list[list[tuple]]:
    taken = []
    for step in itertools.islice(stream, steps):
        taken.append([row for batch in step for row in rows(batch)])
        stream.advance()
    return taken


def read_together(
    open_rank: Callable[[int], TrainStream], world: int, steps: int, state: dict | None = None
) -> tuple[list, dict]:
    """What all ranks read in each step, by position, and the state after it, through JSON as a checkpoint has it."""
    parts, states = [], []
    for rank in range(world):
        stream = open_rank(rank)
        if state:
            stream.load_state_dict(state)
        parts.append(take(stream, steps))
        states.append(stream.state_dict())
    assert all(other == states[0] for other in states)
    return [sorted(itertools.chain(*step)) for step in zip(*parts, strict=True)], json.loads(json.dumps(states[0]))
