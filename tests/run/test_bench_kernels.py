"""The kernel benchmark: its metrics by hand, its rows from the real script, and what it makes of wrong kernels."""

import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from mug.kernels import attention_table
from mug.model.objectives.mug import MUG, MUGConfig
from mug.model.objectives.objective import Context
from mug.model.presets import resolve
from mug.run import bench_kernels
from mug.run.benchmarks import kernel_ops, kernel_report, markdown, model_step
from mug.run.benchmarks.kernel_ops import attention_work, head_work, patch_work
from mug.run.benchmarks.kernel_timing import Ceilings, Stopwatch, Timing, Work, Workload, relative_error
from mug.run.benchmarks.record import Record
from mug.run.benchmarks.synthetic import VOCABULARY, synthetic_batch
from mug.run.common.errors import RunError

ROOT = Path(__file__).parents[2]


def start(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "run/bench_kernels.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> tuple[str, list[dict], Path]:
    """What the script printed, its rows and its picture."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--json", str(folder / "rows.jsonl"), "--png", str(folder / "bars.png"))
    done = start("--device", "cpu", "--seconds", "0", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, read(folder / "rows.jsonl"), folder / "bars.png"


@pytest.mark.slow  # the entire benchmark
def test_the_device_and_its_ceilings_are_named(benchmark):
    printed, (machine, *rows), _ = benchmark
    assert machine["kind"] == "machine" and machine["device"].startswith("CPU, ")
    assert machine["device"] in printed.splitlines()[0] and f"PyTorch {torch.__version__}" in printed.splitlines()[0]
    assert machine["copy_gbytes_per_s"] > 0.1 and machine["matmul_tflops"] > 1e-4
    assert all(row["device"] == machine["device"] for row in rows)


@pytest.mark.slow  # the entire benchmark
def test_every_contender_has_three_passes_or_a_reason(benchmark):
    printed, (_, *rows), _ = benchmark
    timed = [row for row in rows if row["kind"] == "time"]
    assert {row["op"] for row in timed} == {"masked_patch_loss", "linear_cross_entropy", "attention"}
    contenders = {(row["op"], row["shape"], row["contender"]) for row in timed}
    for contender in contenders:
        mine = [row for row in timed if (row["op"], row["shape"], row["contender"]) == contender]
        assert [row["pass"] for row in mine] == ["forward", "backward", "both"]
        assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] == 5 for row in mine)
        assert all(row["error"] < 1e-5 and row["right"] and row["peak_mb"] is None for row in mine)
    skipped = [row for row in rows if row["kind"] == "skipped"]
    assert len(skipped) + len(contenders) == len({tuple(row[k] for k in ("op", "shape", "contender")) for row in rows})
    triton = [row for row in skipped if (row["op"], row["contender"]) == ("masked_patch_loss", "triton")]
    assert len(triton) == 2 and all("needs TRITON_INTERPRET=1" in row["reason"] for row in triton)
    assert all(row["reason"] in printed for row in skipped)


@pytest.mark.slow  # the entire benchmark
def test_the_share_of_the_roofline_follows_from_the_measured_ceilings(benchmark):
    _, (machine, *rows), _ = benchmark
    counted = [row for row in rows if row["kind"] == "time" and row["roofline"] is not None]
    assert {row["op"] for row in counted if row["pass"] == "backward"} == {"attention"}
    for row in counted:
        memory = row["gbytes_per_s"] / machine["copy_gbytes_per_s"]
        arithmetic = row["tflops"] / machine["matmul_tflops"]
        assert row["roofline"] == pytest.approx(max(memory, arithmetic))
    eager = [row for row in counted if (row["op"], row["contender"]) == ("linear_cross_entropy", "reference")]
    assert [row["tflops"] * row["median_ms"] for row in eager] == pytest.approx([6 * 512 * 4096 * 192 / 1e9])


@pytest.mark.slow  # the entire benchmark
def test_the_picture_has_a_bar_for_every_contender(benchmark):
    _, (_, *rows), path = benchmark
    image = Image.open(path).convert("RGB")
    line = kernel_report.LABELS + 1
    column = [image.getpixel((line, y)) for y in range(image.height)]
    blue, grey = (31, 111, 180), (184, 196, 206)
    bars = [a for a, b in itertools.pairwise(column) if a != b and a in (blue, grey)]
    both = [row for row in rows if row["kind"] == "time" and row["pass"] == "both"]
    assert bars == [blue if row["contender"] == "chunked" else grey for row in both]  # Triton needs a GPU


def test_least_work_by_hand():
    # an image: 147 patches of 768 values, 112,896 bytes of pixels, twice 225,792 of bf16, 147 indices
    assert patch_work(256, 147, 768, 2) == Work(256 * (112_896 + 2 * 225_792 + 1_176), 0.0)
    # 1 token, vocabulary 2, width 3 in fp32: 6 multiply-adds a product; (3 + 6) values in and out, one index
    assert head_work(1, 2, 3, 4) == Work(2 * 9 * 4 + 8, 36.0)
    work = attention_work((1, 2, 3, 1, 5), causal=False, element_size=2)
    # q and output have 10 values, k and v 15; a product has 30 multiply-adds
    assert work["forward"] == Work(2 * (10 + 10 + 15 + 15), 120.0)
    assert work["backward"] == Work(2 * (4 * 10 + 4 * 15), 300.0)
    assert work["both"] == Work(300, 420.0)
    assert attention_work((1, 4, 4, 1, 5), True, 2)["forward"].flops == 2 * 2 * 4 * 4 * 5 / 2
    # two sequences of 1 and 3 tokens, packed: 10 pairs, of which the causal mask leaves half
    assert attention_work((1, 4, 4, 1, 5), True, 2, pairs=10)["forward"] == Work(160, 2 * 2 * 10 * 5 / 2)


def test_the_slower_of_memory_and_arithmetic_is_the_roofline():
    ceilings = Ceilings(copy=100.0, matmul=1000.0)
    assert ceilings.share(Work(bytes=50, flops=100), seconds=2.0) == 0.25
    assert ceilings.share(Work(bytes=50, flops=1000), seconds=2.0) == 0.5


def test_preparation_is_not_timed():
    stopwatch = Stopwatch(torch.device("cpu"), seconds=0)
    timing = stopwatch.time(lambda seconds: time.sleep(seconds), lambda: time.sleep(0.2) or 0.001)
    assert 0.001 <= timing.p20 <= timing.median < 0.15 and timing.runs == 5


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def refuses(x: Tensor) -> Tensor:
    raise ValueError("not this shape")


def breaks(x: Tensor) -> Tensor:
    raise RuntimeError("illegal memory access\nand much more")


@pytest.mark.parametrize(
    "kernel, expected",
    [
        (lambda x: x * 1, []),
        (doubled, ["attention triton N=3: error 1.0e+00"]),
        (lambda x: x * torch.nan, ["attention triton N=3: error nan"]),
        (refuses, []),
        (breaks, ["attention triton N=3: RuntimeError: illegal memory access"]),
    ],
    ids=["right", "wrong", "NaN", "refuses", "breaks"],
)
def test_our_own_kernels_may_refuse_but_not_be_wrong(kernel, expected):
    inputs = (torch.randn(3, requires_grad=True),)
    contenders = {"reference": lambda x: x.clone(), "triton": kernel, "other": doubled}
    workload = Workload("attention", "N=3", inputs, contenders, {"both": Work(12, 0)})
    rows = list(bench_kernels.measure(workload, Stopwatch(torch.device("cpu"), 0), Ceilings(1e9, 1e9)))
    assert kernel_report.faults(rows) == expected
    assert [row["contender"] for row in rows if row["kind"] == "time"][-3:] == ["other"] * 3
    table, lines = kernel_report.table("attention", rows), kernel_report.skipped(rows)
    assert table.row_count + len(lines) == 3
    assert all(line.startswith("skipped at 1 shape(s), N=3: triton: ") for line in lines)


def test_relative_error_is_of_the_worst_tensor():
    exact = [torch.tensor([3.0, 4.0]), torch.tensor(2.0)]
    assert relative_error([torch.tensor([3.0, 4.5]), torch.tensor(2.0)], exact) == pytest.approx(0.1)
    assert relative_error([torch.tensor([3.0, 4.5]), torch.tensor(1.0)], exact) == pytest.approx(0.5)


def test_the_summary_gives_our_shares_and_speed_next_to_the_best_right_other():
    def row(contender, shape, milliseconds, share):
        metrics = kernel_report.time_row(Timing(milliseconds / 1e3, 0, 1, 5), Work(0, 0), share)
        names = {"kind": "time", "pass": "both", "op": "masked_patch_loss", "shape": shape, "contender": contender}
        return {**names, **metrics, "right": contender != "every patch"}

    rows = [row("triton", "a", 1, 0.8), row("reference", "a", 5, 0.1), row("triton", "b", 2, 0.9)]
    rows += [row("reference", "b", 8, 0.1), row("torch.compile", "b", 3, 0.2), row("every patch", "b", 1, 0.9)]
    assert kernel_report.summary([*rows, {"kind": "skipped"}]) == (
        "masked_patch_loss triton at 80 to 90% of the roofline, 1.50 to 5.00 times as fast as the best other;"
        " 6 timed, 1 skipped"
    )


def test_what_is_fastest_and_right_goes_into_the_table(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"measured": {}, "entries": []}')
    monkeypatch.setattr(attention_table.write_table, "__defaults__", (path,))
    monkeypatch.setattr(attention_table, "architecture", lambda device: "sm_90")
    kind = {"head_dim": 64, "queries": 50, "keys": 50, "causal": False, "varlen": False}

    def row(contender, name, milliseconds, right=True, shape="N=50", **changes):
        names = {"kind": "time", "op": "attention", "shape": shape, "contender": contender, "pass": name}
        return {**names, "median_ms": milliseconds, "right": right, **kind, **changes}

    rows = [row("triton", "both", 2.0), row("sdpa", "both", 3.0), row("sdpa_flash", "both", 1.0, right=False)]
    rows += [row("torch.compile", "both", 0.5), row("triton", "forward", 2.0), row("sdpa", "forward", 1.5)]
    rows += [row("sdpa", "both", 9.0, keys=257, shape="N=50->257"), row("triton", "backward", 0.1)]
    rows += [{"kind": "skipped", "op": "attention"}, row("triton", "both", 1.0, op="masked_patch_loss")]
    machine = {
        "device": "H100",
        "torch": "2",
        "triton": "3",
        "date": "2026-11-22",
        "dtype": "bfloat16",
        "kind": "machine",
    }
    bench_kernels.write_attention_table(rows, machine)
    key = attention_table.Key("sm_90", True, 64, 64, 64, False, False)
    expected = {key: "triton", key._replace(training=False): "sdpa", key._replace(keys=320): "sdpa"}
    assert attention_table.read_table(path) == expected
    measured = json.loads(path.read_text())["measured"]["sm_90"]
    assert measured["device"] == "H100" and "--write-table" in measured["command"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--op", "softmax"], "--op softmax is not one of masked_patch_loss, linear_cross_entropy, attention;"),
        (["--op", "attention", "model_step"], "--op model_step is not one of .*; or model_step, alone"),
        (["--device", "tpu"], "--device tpu is not one of cuda, cpu"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--write-table", "--device", "cpu"], "--write-table needs --op attention on a GPU"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(monkeypatch, options, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options])
    with pytest.raises(RunError, match=message):
        bench_kernels.parse()


def test_the_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    with pytest.raises(RunError, match="TRITON_INTERPRET=1 is set: unset it"):
        bench_kernels.parse()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_ends_with_one_line():
    done = start("--device", "cuda")
    assert done.returncode == 2
    assert done.stderr == "error: --device cuda: PyTorch sees no GPU here; --device cpu compares the references\n"


def test_naive_losses_and_gradients_are_those_of_the_model():
    small = {"width": 32, "depth": 1, "heads": 2, "pixel_width": 32, "pixel_depth": 1, "pixel_heads": 2}
    text = {"text_width": 32, "text_heads": 2, "text_unimodal_layers": 1, "text_cross_layers": 1, "text_length": 8}
    config = resolve(MUGConfig("tiny", image_size=32, **small, **text))
    torch.manual_seed(0)
    model = MUG(config, Context(vocabulary=VOCABULARY))
    batch = synthetic_batch(config, VOCABULARY, 2, seed=3)
    gradients = []
    for losses_of in (model_step.fused_losses, model_step.naive_losses):
        losses = losses_of(model, batch)
        gradients.append(torch.autograd.grad(losses["pixels"] + losses["caption"], list(model.parameters())))
        gradients[-1] += (losses["pixels"], losses["caption"])
    for fused, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, naive, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_model_step_compares_memory_time_and_losses(tmp_path):
    file = tmp_path / "step.jsonl"
    options = ("--device", "cpu", "--preset", "tiny", "--batch", "8", "--steps", "1")
    done = start("--op", "model_step", *options, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = read(file)
    for path in ("naive", "fused", "activation_checkpointing"):
        assert row[f"{path}_saving"] == pytest.approx(1 - row[f"{path}_peak_mb"] / row["naive_peak_mb"])
        assert row[f"{path}_peak_mb"] > row[f"{path}_before_mb"] > 100
        assert row[f"{path}_time_ratio"] == pytest.approx(row[f"{path}_ms"] / row["naive_ms"])  # one turn
    assert row["largest_loss_difference"] < 1e-5
    assert f"{100 * row['activation_checkpointing_saving']:.1f}% less peak memory" in done.stdout


def test_markdown_sets_our_attention_next_to_the_fastest_of_pytorch():
    def row(contender, milliseconds, **changes):
        names = {"kind": "time", "op": "attention", "pass": "both", "shape": "N=50", "contender": contender}
        rates = {"tflops": 1.0, "gbytes_per_s": 2.0, "roofline": 0.5, "peak_mb": None, "right": True}
        rates |= {"p20_ms": 0.5, "p80_ms": 4.0, "error": 1e-7}
        return {**names, "median_ms": milliseconds, **rates, **changes}

    rows = [row("triton", 1.0), row("sdpa", 3.0), row("sdpa_flash", 1.5), row("reference", 9.0)]
    rows += [row("sdpa_cudnn", 0.1, right=False), row("flash_attn", 1.25), row("sdpa", 7.0, shape="N=577")]
    for contender, forward, backward, both in (("triton", 0.5, 1.25, 2.0), ("reference", 2.0, 3.0, 5.0)):
        times = {"forward": forward, "backward": backward, "both": both}
        rows += [row(contender, ms, op="masked_patch_loss", **{"pass": name}) for name, ms in times.items()]
    lines = "\n".join(markdown.tables(rows)).splitlines()
    assert "| N=50 | 1.000 | 50% | sdpa_flash | 1.500 | 1.50 | flash_attn | 1.250 |" in lines
    assert "| N=577 |  |  | sdpa | 7.000 |  |  |  |" in lines
    assert "| N=50 | triton | 0.500 | 1.250 | 2.000 | 0.500 to 4.000 | 1 | 2 | 50% |  | 2.50 | 1e-07 |" in lines


def add_one(x: Tensor) -> Tensor:
    return x + 1


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the benchmark of three shapes of a made-up op: returns faults, rows on disk and what was printed."""
    shapes = {"N=1": {"reference": add_one, "triton": add_one}, "N=2": {"reference": add_one, "triton": breaks}}
    shapes["N=3"] = {"reference": add_one, "triton": add_one, "sdpa": doubled}

    def workloads(device: torch.device) -> Iterator[Workload]:
        for shape, contenders in shapes.items():
            yield Workload("attention", shape, (torch.ones(3, requires_grad=True),), contenders, {"both": Work(12, 0)})

    monkeypatch.setattr(bench_kernels, "OPS", {"attention": workloads})
    monkeypatch.setattr(bench_kernels, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*options: str) -> tuple[list[str], list[dict], str]:
        command = ["bench_kernels.py", "--op", "attention", "--device", "cpu", "--seconds", "0"]
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "rows.jsonl"), *options])
        options, terminal = bench_kernels.parse(), io.StringIO()
        shown = {"info": lambda line: terminal.write(f"{line}\n"), "show": lambda table, columns: None}
        console = SimpleNamespace(**shown)
        faults = bench_kernels.bench_kernels(options, Record(options.json), console)
        return faults, read(tmp_path / "rows.jsonl"), terminal.getvalue()

    run.file = tmp_path / "rows.jsonl"
    return run


def test_rows_are_on_disk_before_the_next_shape(bench, monkeypatch):
    seen = []
    measure = bench_kernels.measure

    def look_first(workload, *others):
        seen.append([row.get("shape") for row in read(bench.file)])
        return measure(workload, *others)

    monkeypatch.setattr(bench_kernels, "measure", look_first)
    bench()
    first, second = ["N=1"] * 6, ["N=2"] * 4  # three passes of each contender; a broken one has one row
    assert seen == [[None], [None, *first], [None, *first, *second]]


def test_a_contender_that_breaks_the_gpu_ends_the_process_and_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench_kernels, "is_lost", lambda device: True)
    with pytest.raises(RunError, match=r"attention triton N=2 has broken the GPU .*: illegal memory access"):
        bench()
    assert read(bench.file)[-1]["reason"] == "RuntimeError: illegal memory access"


def test_shapes_contenders_and_budget_choose_what_is_timed(bench):
    _, rows, printed = bench("--shapes", "N=[13]", "--contenders", "triton", "sdpa")
    assert {(row["shape"], row["contender"]) for row in rows[1:]} == {
        ("N=1", "triton"),
        ("N=3", "triton"),
        ("N=3", "sdpa"),
    }
    assert all(row["right"] == (row["contender"] == "triton") for row in rows[1:])  # the reference is the measure still
    assert "attention N=3: triton " in printed and "sdpa " in printed and "WRONG" in printed
    _, rows, printed = bench("--budget", "0")
    assert len(rows) == 1 and "left out after 0 s: attention N=1, attention N=2, attention N=3" in printed
    with pytest.raises(RunError, match="leave nothing to time"):
        bench("--contenders", "tritn")
    with pytest.raises(RunError, match=r"--shapes N=\( is not a regular expression"):
        bench("--shapes", "N=(")


def test_what_matters_most_is_timed_first():
    """Of base: encoder, pixel decoder, captions to themselves and to the image."""
    kinds = [workload.kind for workload in kernel_ops.attention_workloads(torch.device("cpu"))]
    first = [(50, 50, False), (197, 197, False), (64, 64, True), (64, 50, True)]
    assert [(kind["queries"], kind["keys"], kind["varlen"]) for kind in kinds] == first
    assert [call[:2] for _, call in kernel_ops.SIZES["cuda"].attention[:4]] == [size[:2] for size in first]
