import os

# Threads that wait for each other on a busy machine make these small products many times slower, in commands too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():  # read when a kernel is defined, so before any test module imports triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def one_rank():
    """The process group of one rank."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mended_interpreter(monkeypatch):
    """Triton 3.6 and 3.7 turn a loop's bound, an array of one element, into an int; numpy 2.4 refuses that."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_repair)
