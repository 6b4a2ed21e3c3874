"""Time kernels against the limits of the machine that they run on, with cold caches, and check what they compute."""

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WARM_UPS, MIN_RUNS, MAX_RUNS = 3, 5, 200
COLD_BYTES = {"cpu": 2**26, "cuda": 2**29}  # beyond any cache: written before every run
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
SLEEP_CYCLES = 2_000_000  # about 1 ms, in which the host queues the run: its launches are not timed
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of ‖x - exact‖ / ‖exact‖


@dataclass(frozen=True)
class Work:
    """The minimum work of a pass: bytes to move through memory, useful floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Workload:
    """One op at one shape, and its contenders.

    `contenders` map `inputs` to one output, and "reference", plain PyTorch, is among them; gradients are wanted for
    the inputs that require one. `work` holds the passes whose minimum work is known: where forward writes the
    gradients, only "both".
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[..., Tensor]]
    work: dict[str, Work]
    kind: dict[str, object] = field(default_factory=dict)  # of an attention call, as attention_table.Key has it


@dataclass(frozen=True)
class Ceilings:
    """The ceilings measured on a large copy (bytes/s, read and written) and a large product (FLOP/s)."""

    copy: float
    matmul: float

    def share(self, work: Work, seconds: float) -> float:
        """Returns the share of the roofline: the longer of memory's and arithmetic's minimum times, over `seconds`."""
        return max(work.bytes / self.copy, work.flops / self.matmul) / seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of the median run and of its 20th and 80th percentile; how many runs."""

    median: float
    p20: float
    p80: float
    runs: int


class Stopwatch:
    """Times work on one device; `seconds` is about how long one timing may take."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.cold = torch.empty(COLD_BYTES[device.type], dtype=torch.uint8, device=device)

    def time(self, timed: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> Timing:
        """Returns the timing of `timed(prepare())`, without `prepare`."""
        run = self._run_on_gpu if self.device.type == "cuda" else self._run_on_cpu
        for _ in range(WARM_UPS):
            begin = time.perf_counter()
            run(timed, prepare)
        cost = time.perf_counter() - begin
        runs = min(max(MIN_RUNS, int(self.seconds / cost)), MAX_RUNS)
        seconds = [run(timed, prepare) for _ in range(runs)]
        p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        return Timing(statistics.median(seconds), p20, p80, runs)

    def _run_on_cpu(self, timed: Callable[[Any], object], prepare: Callable[[], Any]) -> float:
        prepared = prepare()
        self.cold.zero_()
        begin = time.perf_counter()
        timed(prepared)
        return time.perf_counter() - begin

    def _run_on_gpu(self, timed: Callable[[Any], object], prepare: Callable[[], Any]) -> float:
        prepared = prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        timed(prepared)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure_ceilings(stopwatch: Stopwatch, dtype: torch.dtype) -> Ceilings:
    """Measure a large copy, and a large product of random matrices in `dtype`."""
    kind = stopwatch.device.type
    source = torch.randint(0, 256, (COPY_BYTES[kind],), dtype=torch.uint8, device=stopwatch.device)
    target = torch.empty_like(source)
    copy = stopwatch.time(lambda _: target.copy_(source)).median
    side = MATMUL_SIDE[kind]
    a, b = (torch.randn(side, side, device=stopwatch.device, dtype=dtype) for _ in range(2))
    product = stopwatch.time(lambda _: a @ b).median
    return Ceilings(2 * source.numel() / copy, 2 * side**3 / product)


def machine_row(device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> dict[str, object]:
    """Returns what the metrics were measured on, as the first row of a record."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {
        "kind": "machine",
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "date": datetime.date.today().isoformat(),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gbytes_per_s": ceilings.copy / 1e9,
        "matmul_tflops": ceilings.matmul / 1e12,
    }


def time_passes(workload: Workload, contender: str, stopwatch: Stopwatch) -> dict[str, Timing]:
    """Yields the timing of forward (which keeps what backward needs), of only backward, and of both."""
    function, wanted = workload.contenders[contender], _wanted(workload.inputs)
    grad_output = _grad_output(function(*workload.inputs))

    def forward(_: object) -> Tensor:
        return function(*workload.inputs)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, wanted, grad_output)

    return {
        "forward": stopwatch.time(forward),
        "backward": stopwatch.time(backward, lambda: forward(None)),
        "both": stopwatch.time(lambda _: backward(forward(None))),
    }


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns output and wanted gradients, for the grad_output that timings use too."""
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, _wanted(inputs), _grad_output(output))]


def exact_results(workload: Workload) -> list[Tensor]:
    """Returns what the reference computes in fp32."""
    inputs = tuple(
        x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in workload.inputs
    )
    return results(workload.contenders["reference"], inputs)


def relative_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the largest ‖x - exact‖ / ‖exact‖ of output and gradients; NaN if there is one."""
    errors = [(x.float() - y).norm() / y.norm() for x, y in zip(got, exact, strict=True)]
    return torch.stack(errors).max().item()


def is_right(error: float, workload: Workload) -> bool:
    """Whether rounding explains the error; it does not explain NaN."""
    return error <= TOLERANCE[_wanted(workload.inputs)[0].dtype]


def is_lost(device: torch.device) -> bool:
    """Whether the GPU is lost to this process: after an illegal access, every call fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def peak_memory(workload: Workload, contender: str) -> float | None:
    """Returns the bytes that forward and backward take beyond the inputs; None on CPU, where they are not counted."""
    if workload.inputs[0].device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(workload.contenders[contender], workload.inputs)
    return torch.cuda.max_memory_allocated() - before


def _wanted(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def _grad_output(output: Tensor) -> Tensor | None:
    """None for a loss, which stands for 1."""
    if output.ndim == 0:
        return None
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
