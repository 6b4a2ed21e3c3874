"""Saves while training: when a checkpoint is due, which rank writes what, and what training waits for."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mug.run.cluster import hardware
from mug.run.common.errors import ReportedByRankZero, RunError
from mug.run.state import checkpoint
from mug.run.state.config import CheckpointConfig
from mug.run.state.extra_state import EXTRA, copy_extra_state, write_extra_state
from mug.run.state.sharded_state import (
    KINDS,
    State,
    adam_steps,
    hexadecimal,
    owned_slices,
    slices_by_kind,
    write_pieces,
)


@dataclass
class PendingSave:
    """A checkpoint being written: between its first byte and its commit."""

    step: int
    manifest: dict[str, Any]
    text_files: dict[str, str]
    written: "Future[ShardReport]"
    stall: float  # seconds that training has waited for it


class ShardReport(NamedTuple):
    """A rank's part of a checkpoint: its files' checksums, its slices' digests by kind, and the seconds it took."""

    files: dict[str, dict[str, Any]]
    digests: dict[str, int]
    seconds: float


class Saver:
    """Writes and commits a run's checkpoints, one at a time; all ranks call the same methods at the same steps.

    Asynchronous, the state is copied to host memory (12 bytes for each weight of the rank's share) and written from
    there by a thread, which makes no collective call. `poll` and `finish` commit it once all ranks have written.
    """

    def __init__(
        self, engine: Any, output: Path, config: CheckpointConfig, committed: Callable[[int, dict[str, float]], None]
    ):
        self.engine, self.output, self.config, self.committed = engine, output, config, committed
        self.pending: PendingSave | None = None
        self.last = time.monotonic()
        self.thread = ThreadPoolExecutor(1, initializer=hardware.use_device)
        # Now, because memory that was never touched takes longer to fill than to write to a disk.
        self.host: Future | None = self.thread.submit(_host_buffer, engine) if config.asynchronous else None

    def interval_elapsed(self) -> bool:
        """Whether `every_minutes` have passed since the last save, by rank 0's clock: a collective call."""
        if not self.config.every_minutes:
            return False
        passed = torch.tensor([time.monotonic() - self.last], device=hardware.device())
        dist.broadcast(passed, src=0)
        return passed.item() >= 60 * self.config.every_minutes

    def save(self, step: int, manifest: dict[str, Any], text_files: dict[str, str]) -> None:
        """Begin a checkpoint of the engine as it is now; if not asynchronous, also end it.

        Raises:
            RunError: a file cannot be written; also of the previous checkpoint, if that was still being written.
        """
        self.finish()
        begin = self.last = time.monotonic()
        partial = self._on_rank_zero(step, lambda: checkpoint.open_partial(self.output, step))
        state = slices_by_kind(self.engine, owned_slices(self.engine))
        if self.host is not None:
            state = _copy(state, self.host.result())
        extra = copy_extra_state(self.engine.module) if dist.get_rank() == 0 else {}
        hardware.wait_for_device()  # the copies; or the step, whose results the thread is about to read
        written = self.thread.submit(_write, partial, dist.get_rank(), dist.get_world_size(), state, extra)
        manifest = {**manifest, "adam_steps": adam_steps(self.engine)}
        self.pending = PendingSave(step, manifest, text_files, written, time.monotonic() - begin)
        if self.host is None:
            self.finish()

    def poll(self) -> None:
        """Commit the checkpoint that is being written if all ranks are done: a collective call while there is one."""
        if self.pending is not None:
            done = torch.tensor([self.pending.written.done()], dtype=torch.int32, device=hardware.device())
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and commit it.

        Raises:
            RunError: a rank cannot write; names the folder.
        """
        if self.pending is None:
            return
        begin, save, self.pending = time.monotonic(), self.pending, None
        ranks = self._gather(save)
        files = {name: checksum for rank in ranks for name, checksum in rank.files.items()}
        digests = {kind: hexadecimal(sum(rank.digests[kind] for rank in ranks)) for kind in KINDS}
        state = {**save.manifest, "digests": digests}
        keep = self.config.keep
        self._on_rank_zero(
            save.step, lambda: checkpoint.commit(self.output, save.step, files, state, save.text_files, keep)
        )
        stall = save.stall + time.monotonic() - begin
        self.committed(save.step, {"seconds": stall, "write_seconds": max(rank.seconds for rank in ranks)})

    def _gather(self, save: PendingSave) -> list[ShardReport]:
        """Returns what every rank has written."""
        error = save.written.exception()
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, save.written.result() if error is None else str(error) or repr(error))
        errors = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if errors:
            raise (ReportedByRankZero if dist.get_rank() else RunError)(self._cannot_be_written(save.step, errors[0]))
        return outcomes

    def _on_rank_zero(self, step: int, act: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            try:
                return act()
            except OSError as error:
                raise RunError(self._cannot_be_written(step, error)) from None

        return hardware.on_rank_zero(attempt)

    def _cannot_be_written(self, step: int, error: object) -> str:
        return (
            f"{self.output}/checkpoint-{step} cannot be written ({error}); free disk space, or choose another --output;"
            " the checkpoint before it is intact"
        )


def _host_buffer(engine: Any) -> Tensor:
    """Returns fp32 buffers for all that this rank owns; pinned where there is a GPU to copy from."""
    numel = sum(len(one.kinds) * one.numel for one in owned_slices(engine))
    return torch.empty(numel, pin_memory=torch.cuda.is_available()).fill_(0)


def _copy(state: State, host: Tensor) -> State:
    """Returns the current state, in host memory once the device is done."""
    copied, used = {}, 0
    for kind, pieces in state.items():
        copied[kind] = {}
        for piece, values in pieces.items():
            copied[kind][piece] = host[used : used + len(values)].copy_(values, non_blocking=True)
            used += len(values)
    return copied


def _write(partial: Path, rank: int, world: int, state: State, extra: dict[str, Tensor]) -> ShardReport:
    """Write this rank's files, one of each kind, and the extra state, if it has any."""
    begin = time.monotonic()
    files, digests = {}, {}
    for kind, pieces in state.items():
        name = f"{kind}-{rank:05}-of-{world:05}.safetensors"
        files[name], digests[kind] = write_pieces(partial / name, pieces)
    if extra:
        write_extra_state(partial, extra)
        files[EXTRA] = checkpoint.checksum(partial / EXTRA)
    return ShardReport(files, digests, time.monotonic() - begin)
