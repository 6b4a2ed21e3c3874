"""Micro-batches on their way to the device: each is copied there while the one before it is computed."""

from collections.abc import Iterable
from concurrent.futures import Future

import torch

from mug.data.kinds.samples import Batch
from mug.run.cluster import hardware


class Ahead:
    """Fetches the next step's micro-batches, and copies to this rank's device, before they are asked for.

    On a GPU a copy runs from pinned memory on a stream of its own; on a CPU there is nothing to copy.

    Args:
        steps: the micro-batches of each step, on the host.
    """

    def __init__(self, steps: Iterable[list[Batch]] = ()):
        self.steps = iter(steps)
        self.fetched: Future[list[Batch]] | None = None  # the next step, or what went wrong when it was fetched
        self.sent: tuple[Batch, Batch] | None = None  # a batch, and its copy
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, none after the last; raises what fetching them raised."""
        fetched, self.fetched = self._fetch(), None
        return fetched.result()

    def send(self, following: list[Batch]) -> None:
        """Start to copy the first of these, or of the next step's if there is none: call it when the device is busy.

        A step that cannot be fetched raises nothing here, so that the present one is finished.
        """
        if not following and not (fetched := self._fetch()).exception():
            following = fetched.result()
        if following:
            self.sent = following[0], self._copy(following[0])

    def take(self, batch: Batch) -> Batch:
        """The batch on the device: the copy that was sent ahead, if it is this one's, or one that starts now."""
        sent, self.sent = self.sent, None
        copy = sent[1] if sent and sent[0] is batch else self._copy(batch)
        if self.stream is not None:
            present = torch.cuda.current_stream()
            present.wait_stream(self.stream)
            for tensor in copy.values():
                tensor.record_stream(present)  # its memory is not the copying stream's again before `present` is done
        return copy

    def _fetch(self) -> Future[list[Batch]]:
        if self.fetched is None:
            self.fetched = Future()
            try:
                self.fetched.set_result(next(self.steps, []))
            except Exception as error:
                self.fetched.set_exception(error)
        return self.fetched

    def _copy(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self.stream):
            return hardware.to_device(batch)
