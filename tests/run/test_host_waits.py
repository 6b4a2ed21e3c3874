"""What the host would wait for in a step on a GPU, found on a CPU by what its operators are called."""

import pytest
import test_curves
import torch

from mug.kernels.linear_cross_entropy import linear_cross_entropy
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context, find_objective
from mug.model.presets import Vocabulary, resolve
from mug.model.two_views import TwoViews
from mug.run.benchmarks.synthetic import WEIGHTS, synthetic_batch
from mug.run.cluster import hardware
from mug.run.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_rank")
VOCABULARY = Vocabulary(50, pad=0, bos=1, eos=2, mask=3)
# Their result's size, or what the host does next, depends on values; or a constant is copied from pageable memory.
# A mask as an index is a nonzero, too.
OPERATORS = ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "equal", "_unique2", "lift_fresh")
METHODS = ("tolist", "numpy", "cpu")
NAMES = {f"aten::{name}": name for name in OPERATORS} | {f"<built-in method {name}": name for name in METHODS}
# Values are checked on CPUs alone, and packed captions are grouped there by their lengths.
ON_CPUS_ALONE = ("_check", "_check_values", "_check_starts", "_by_length")
ON_THE_HOST = ("prepare", "counts", "loss_scales")  # which has the batch: if it is not `forward` that calls


class Engine:
    """What train_step needs of DeepSpeed's, whose own waits are not the project's."""

    def __init__(self, module: MUG):
        self.module = module

    def __call__(self, batch):
        return self.module(batch)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass


def waits_of(step) -> list[str]:
    """Operator and place of all that waits in `step()`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True) as profiler:
        step()
    seen = any("test_host_waits.py" in event.name for event in profiler.events())
    if not seen and torch.__version__ < (2, 15):
        pytest.skip("the profiler of PyTorch 2.11 sees no Python functions under Python 3.12")
    assert seen, "the profiler sees no Python functions: nothing can be said of waits"
    found = []
    for event in profiler.events():
        if (name := NAMES.get(event.name.partition(" of Tensor")[0])) is not None:
            frames = list(_callers(event))
            functions = {frame.rpartition(": ")[2] for frame in frames}
            on_the_host = functions.intersection(ON_THE_HOST) and "forward" not in functions
            if not functions.intersection(ON_CPUS_ALONE) and not on_the_host:
                found.append(f"{name} in {next(iter(frames), 'a backward of PyTorch')}")
    return found


def _callers(event):
    """The project's functions in which an operator was called, the innermost first, up to train_step."""
    while event := event.cpu_parent:
        if any(f"{folder}/" in event.name for folder in ("model", "kernels", "run/cluster", "run/training")):
            yield event.name


KINDS = pytest.mark.parametrize(
    ("captioning", "budget"),
    [("autoregressive", None), ("masked-language", 50 * 8 * 4)],
    ids=["autoregressive, all logits at once", "masked-language, in chunks"],
)


def small_model(captioning: str) -> MUG:
    sizes = {"depth": 1, "pixel_depth": 1, "text_unimodal_layers": 1, "text_cross_layers": 1}
    return MUG(resolve(MUGConfig(**sizes, captioning=captioning)), Context(vocabulary=VOCABULARY))


@KINDS
@pytest.mark.skipif(torch.cuda.is_available(), reason="finds them by what runs on CPUs")
def test_the_host_waits_for_nothing_in_a_step(captioning, budget, monkeypatch):
    engine = Engine(small_model(captioning))
    if budget:
        monkeypatch.setitem(linear_cross_entropy.__kwdefaults__, "memory_budget", budget)
    batch = synthetic_batch(engine.module.config, VOCABULARY, 3)
    found = waits_of(lambda: train_step(engine, [batch], WEIGHTS))
    assert not found, "\n".join(found)


TWO_VIEWS = [name for name in test_curves.NAMES if issubclass(find_objective(name), TwoViews)]


@pytest.mark.parametrize("name", TWO_VIEWS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="finds them by what runs on CPUs")
def test_the_host_waits_for_nothing_in_a_step_on_two_views(name):
    engine = Engine(test_curves.make(name))
    batch = test_curves.batch_of(engine.module, range(4))
    found = waits_of(lambda: train_step(engine, [batch], engine.module.losses))
    assert not found, "\n".join(found)


@KINDS
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's driver is asked")
def test_the_driver_sees_no_wait_in_a_step(captioning, budget, monkeypatch):
    if budget:
        monkeypatch.setitem(linear_cross_entropy.__kwdefaults__, "memory_budget", budget)
    engine = Engine(small_model(captioning).to(hardware.device(), torch.bfloat16))
    batch = synthetic_batch(engine.module.config, VOCABULARY, 3)
    try:
        for mode in ("default", "error"):  # kernels are compiled, and memory is asked for, in the first step
            torch.cuda.set_sync_debug_mode(mode)
            train_step(engine, [batch], WEIGHTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_kinds_of_waits_are_found():
    x = torch.arange(3)

    def step():
        x[x > 1], x.tolist(), x.sum().item(), bool(x[0]), torch.equal(x, x), torch.tensor([1]), x.nonzero()

    names = [wait.split()[0] for wait in waits_of(step)]
    assert sorted(set(names)) == ["_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "nonzero", "tolist"]
    assert names.count("nonzero") == 2
