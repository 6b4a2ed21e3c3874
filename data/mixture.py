"""Several streams as one: which stream each group of a run is of, and which of its samples, by `mug.data.shares`.

The state of a mixture is its position, and from which group on which weights were in force: one phase, unless a run
resumed with another mixture. All ranks take the same branch.
"""

import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from mug.data import rng
from mug.data.bad_samples import Replacement
from mug.data.errors import DataError
from mug.data.kinds.samples import Batch, Samples, Shape, find_kind
from mug.data.order import SampleOrder
from mug.data.shares import drawn, locate
from mug.data.stream import BatchShard, TrainStream
from mug.data.tokenizer import Tokenizer
from mug.data.workers import start_fork_server


@dataclass(frozen=True)
class StreamConfig:
    """One stream of a run.

    config: the `Config` of its kind.
    kind: the name of a module of mug.data.kinds.
    weight: its share of the groups, relative to the other streams' weights.
    """

    config: Any
    kind: str = "pairs"
    weight: float = 1.0


@dataclass(frozen=True)
class MixtureOrder:
    """The order of a mixture: mug.data.order.SampleOrder. An epoch has as many samples as the streams' together.

    phases: first group and weights of each, in order; the last one's weights are in force.
    """

    seed: int
    group: int
    samples: int
    phases: tuple[tuple[int, dict[str, float]], ...]

    @property
    def weights(self) -> dict[str, float]:
        """Returns stream → weight."""
        return self.phases[-1][1]

    def __len__(self) -> int:
        return self.samples

    def constants(self) -> dict[str, Any]:
        """Returns what, with the seed, fixes which samples stand at a position."""
        return {"group": self.group, "weights": self.weights}

    def locate(self, group: int) -> tuple[str, int]:
        """Returns the stream of a group, and how many groups before it were of that stream."""
        phases, before = [phase for phase in self.phases if phase[0] <= group], Counter[str]()
        for (first, weights), (end, _) in pairwise(phases):
            before.update(dict(zip(weights, drawn(list(weights.values()), self.seed, end - first), strict=True)))
        first, weights = phases[-1]
        stream, count = locate(list(weights.values()), self.seed, group - first)
        name = list(weights)[stream]
        return name, before[name] + count


def _order(stream: Samples) -> SampleOrder:
    """The order of a stream, which is one to train on."""
    assert stream.order is not None
    return stream.order


class Mixture:
    """Several streams, drawn group by group by their weights: mug.data.kinds.samples.Samples.

    A group is `group` consecutive positions, all of one stream, whose next samples they are.
    """

    kind = "mixture"  # each batch has that of its stream

    def __init__(self, streams: Mapping[str, tuple[Samples, float]], seed: int, group: int):
        for name, (_, weight) in streams.items():
            if not 0 < weight < math.inf:
                raise DataError(f"data.{name}.weight is {weight}: give more than 0, or leave the stream out")
        self.streams = {name: streams[name][0] for name in sorted(streams)}
        weights = {name: float(streams[name][1]) for name in self.streams}
        samples = sum(len(_order(stream)) for stream in self.streams.values())
        self.order = MixtureOrder(seed, group, samples, ((0, weights),))
        self.tokenizer: Tokenizer | None = self._common("tokenizer", lambda tokenizer: tokenizer.fingerprint)
        self.class_names: tuple[str, ...] = self._common("class_names", tuple) or ()

    def _common(self, what: str, key: Any) -> Any:
        """Returns the value that those streams share that have one.

        Raises:
            DataError: they differ.
        """
        having = {name: value for name, stream in self.streams.items() if (value := getattr(stream, what))}
        if len({key(value) for value in having.values()}) > 1:
            names = " and ".join(f"data.{name}" for name in having)
            raise DataError(f"{names} differ in their {what.replace('_', ' ')}: the streams of a run share one model")
        return next(iter(having.values()), None)

    def __len__(self) -> int:
        """Returns the number of samples in all streams."""
        return sum(len(stream) for stream in self.streams.values())

    def identity(self) -> dict[str, Any]:
        """Returns what the streams' positions depend on; `fingerprint` is that of all of it."""
        of = {
            f"{name}.{key}": value
            for name, stream in self.streams.items()
            for key, value in {**_order(stream).constants(), "seed": _order(stream).seed, **stream.identity()}.items()
        }
        return of | {"fingerprint": hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()}

    def files(self) -> dict[str, str]:
        """Returns what a checkpoint keeps, by file name."""
        return {name: text for stream in self.streams.values() for name, text in stream.files().items()}

    def locate(self, position: int) -> tuple[str, int]:
        """Returns the stream of a position, and what is to be added to get the position in that stream."""
        group = self.order.group
        name, before = self.order.locate(position // group)
        return name, (before - position // group) * group

    def batch(self, positions: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        """Returns the samples at positions of one group: a batch of its stream's kind, with the mixture's positions."""
        group = self.order.group
        if positions[0] // group != positions[-1] // group:
            raise ValueError(f"positions {positions[0]} and {positions[-1]} are of two groups")
        name, shift = self.locate(positions[0])
        batch, replaced = self.streams[name].batch([position + shift for position in positions])
        batch["position"] = torch.tensor(list(positions))
        return batch, [replace(one, position=one.position - shift) for one in replaced]


MIXED = ("samples", "weights", "fingerprint")  # of a mixture's identity, what follows from which streams it has


class MixtureStream(TrainStream):
    """A training stream of several, whose weights may change, and streams come and go, where a run resumes.

    Each stream continues where it was; what is new begins.
    """

    @property
    def mixture(self) -> Mixture:
        assert isinstance(self.source, Mixture)
        return self.source

    def state_dict(self) -> dict:
        return super().state_dict() | {"phases": [list(phase) for phase in self.mixture.order.phases]}

    def load_state_dict(self, state: dict, allow_changes: bool = False) -> None:
        order = self.mixture.order
        weights, before = order.weights, state.get("weights") or {}
        phases = [tuple(phase) for phase in state.get("phases", [(0, before)])]
        if allow_changes and before and before != weights:
            new = (*(f"{name}." for name in weights if name not in before),)
            mine = self._identity().items()
            state = state | {key: value for key, value in mine if key in MIXED or key.startswith(new)}
            phases.append((state["next_position"] // order.group, weights))
        super().load_state_dict(state)
        self.order = self.mixture.order = replace(order, phases=tuple(phases))


def open_stream(streams: Mapping[str, StreamConfig], seed: int, shape: Shape, share: BatchShard) -> TrainStream:
    """Returns the training stream of one rank: over the one stream that is named, or the mixture of several.

    In a mixture each stream has a seed of its own, of `seed` and its name, so that two do not draw the same.

    Raises:
        DataError: a kind does not exist, a weight is not positive, the streams do not fit together, or as the kinds'
            `open_train`.
    """
    workers = max(getattr(one.config, "workers", 0) for one in streams.values())
    if workers:
        start_fork_server()
    if len(streams) == 1:
        ((_, one),) = streams.items()
        return TrainStream(find_kind(one.kind).open_train(one.config, seed, shape), share, workers)
    opened = {
        name: (find_kind(one.kind).open_train(one.config, _seed_of(name, seed), shape), one.weight)
        for name, one in streams.items()
    }
    return MixtureStream(Mixture(opened, seed, share.group), share, workers)


def _seed_of(name: str, seed: int) -> int:
    return int(rng.raw(seed, rng.MIXTURE, 1, zlib.crc32(name.encode()), 1)[0] >> 1)


def open_held_out(streams: Mapping[str, StreamConfig], shape: Shape) -> dict[str, Samples]:
    """Returns the held-out samples of those streams that have some, by name.

    Raises:
        DataError: as the kinds' `open_held_out`.
    """
    opened = {name: find_kind(one.kind).open_held_out(one.config, shape) for name, one in streams.items()}
    return {name: samples for name, samples in opened.items() if samples is not None}
