"""Several hosts, as namespaces of this machine (hosts.py): the launches that cross them."""

import subprocess
import time

import psutil
import pytest
from hosts import INTERFACE, cluster, lacking
from launch import BIN, TOY, ZERO3, environment, losses, pretrain, rows

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

# Divides by two and by three ranks.
OPTIONS = [*TOY, "--trainer.global_batch", "24", "--trainer.max_steps", "8", "--trainer.eval_every", "4"]


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    # What has to travel to the other hosts: strictly KEY=VALUE.
    (folder / "deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n")
    with cluster(3, folder / "cluster") as made:
        yield made


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    output = tmp_path_factory.mktemp("one_host") / "run"
    done = pretrain(output, *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def assert_same_curve(output, reference) -> None:
    for kind in ("train", "eval"):
        mine, theirs = losses(output, kind), losses(reference, kind)
        assert len(mine) == len(theirs) > 0
        for one, other in zip(mine, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-4), f"{kind}, step {one['step']}"


def hostfile_of(three_hosts, count: int, folder):
    lines = three_hosts.hostfile.read_text().splitlines(keepends=True)
    (folder / "hosts").write_text("".join(lines[:count]))
    return str(folder / "hosts")


def by_hostfile(three_hosts, hostfile: str, *command: str):
    env_file = str(three_hosts.hostfile.parents[1] / "deepspeed_env")
    return three_hosts.run(str(BIN / "deepspeed"), "--hostfile", hostfile, *command, DS_ENV_FILE=env_file)


def train(output) -> list[str]:
    return ["run/pretrain.py", "--deepspeed", ZERO3, "--output", str(output), *OPTIONS]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_hostfile(three_hosts, one_host, tmp_path, count):
    """Over ssh and pdsh, ZeRO-3: the losses of one host."""
    output = tmp_path / "run"
    done = by_hostfile(three_hosts, hostfile_of(three_hosts, count, tmp_path), *train(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"x {count} rank(s)" in done.stdout
    assert_same_curve(output, one_host)


def on_each(three_hosts, commands: list[list[str]], **variables: str) -> list[subprocess.Popen]:
    """Start a command on each host."""
    return [
        subprocess.Popen(
            host.command(command),
            env=environment() | {"GLOO_SOCKET_IFNAME": INTERFACE} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, command in zip(three_hosts.hosts, commands, strict=False)
    ]


def ends(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.slow
def test_started_on_each_host_without_ssh(three_hosts, one_host, tmp_path):
    output, hostfile = tmp_path / "run", hostfile_of(three_hosts, 2, tmp_path)
    launcher = [str(BIN / "deepspeed"), "--hostfile", hostfile, "--no_ssh", "--master_addr", "host1", "--node_rank"]
    started = on_each(three_hosts, [[*launcher, str(number), *train(output)] for number in (0, 1)])
    for status, said in map(ends, started):
        assert status == 0, said
    assert_same_curve(output, one_host)


@pytest.mark.slow
def test_torchrun_starts_anew_with_the_host_that_is_left(three_hosts, one_host, tmp_path):
    """Elastic rendezvous: one of two hosts is lost, and the other goes on from the newest checkpoint alone."""
    output = tmp_path / "run"
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    meeting = ["--rdzv-endpoint", "host1:29400", "--rdzv-id", "run", "--rdzv-conf", "last_call_timeout=20"]
    command = [str(BIN / "torchrun"), *elastic, *meeting, *train(output), "--checkpoint.every_steps", "2"]
    first, second = on_each(three_hosts, [command, command])
    while not (output / "latest").exists():
        assert first.poll() is second.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    for process in psutil.Process(second.pid).children(recursive=True):
        process.kill()
    status, said = ends(first)
    assert status == 0, said
    second.communicate()
    lives = [row["world_size"] for row in rows(output, "event") if row["event"] in ("start", "resume")]
    assert lives == [2, 1], said
    assert_same_curve(output, one_host)


@pytest.mark.slow
def test_preflight_sees_a_folder_that_is_not_shared(three_hosts, tmp_path):
    """The second host has another disk at that path."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    assert three_hosts.run("mount", "-t", "tmpfs", "none", str(hidden), on=1).returncode == 0
    hostfile = hostfile_of(three_hosts, 2, tmp_path)
    options = ["run/preflight.py", "--deepspeed", ZERO3, "--output", str(hidden / "run"), *OPTIONS]
    done = by_hostfile(three_hosts, hostfile, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT ready: shared folder" in done.stdout and "rank 1 on host2" in done.stdout
    assert f"{INTERFACE}, 10.77.0.1" in done.stdout and f"{INTERFACE}, 10.77.0.2" in done.stdout


@pytest.mark.slow
def test_a_host_that_does_not_exist(three_hosts, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("host1 slots=1\nhost9 slots=1\n")
    env_file = tmp_path / "env"
    env_file.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nMUG_PATIENCE_SECONDS=5\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile)]
    done = three_hosts.run(*launcher, *train(tmp_path / "run"), DS_ENV_FILE=str(env_file))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "rank(s) 1 of 2 did not come" in errors[0] and "here are ranks on host1:" in errors[0]
    assert "host9: ssh: Could not resolve hostname host9" in done.stderr  # pdsh's
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
