"""Several hosts, as namespaces of this machine (hosts.py): the launches that cross them."""

import contextlib
import subprocess
import sys
import time

import psutil
import pytest
from hosts import INTERFACE, cluster, lacking
from launch import BIN, DRAWINGS, TOY, ZERO3, environment, losses, pretrain, rows

from mug.run.state import checkpoint

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
    return ["run/pretrain.py", "--deepspeed", ZERO3, "--output", str(output), *DRAWINGS, *OPTIONS]


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
def test_torchrun_starts_again_with_the_host_that_is_left(three_hosts, one_host, tmp_path):
    """Elastic rendezvous: one of two hosts is lost, and the other resumes from the newest checkpoint alone."""
    output = tmp_path / "run"
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    meeting = ["--rdzv-endpoint", "host1:29400", "--rdzv-id", "run", "--rdzv-conf", "last_call_timeout=120"]
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
    env_file.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nMUG_RENDEZVOUS_SECONDS=5\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile)]
    done = three_hosts.run(*launcher, *train(tmp_path / "run"), DS_ENV_FILE=str(env_file))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "rank(s) 1 of 2 did not reach the rendezvous" in errors[0] and "present: ranks on host1:" in errors[0]
    assert "host9: ssh: Could not resolve hostname host9" in done.stderr  # pdsh's
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_are_checked_before_the_launch(three_hosts, tmp_path):
    """With a first host that does not exist, DeepSpeed's launcher ends in a traceback before any of ours."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("host9 slots=1\nhost1 slots=1\nhost2 slots=1\n")
    done = three_hosts.run(sys.executable, "run/check_hosts.py", str(hostfile))
    assert (done.returncode, done.stderr) == (1, "")
    missing, *others = done.stdout.splitlines()
    assert missing.startswith("host9: ssh: Could not resolve hostname host9: ")
    assert others[:2] == ["host1: ok, at 10.77.0.1", "host2: ok, at 10.77.0.2"]
    hostfile.write_text("host1 slots=1\nhost2 slots=1\n")
    done = three_hosts.run(sys.executable, "run/check_hosts.py", str(hostfile))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ready: 2 host(s)")


def cut_session(launched: subprocess.Popen, session: psutil.Process) -> None:
    session.kill()


def kill_pdsh(launched: subprocess.Popen, session: psutil.Process) -> None:
    started = psutil.Process(launched.pid).children(recursive=True)
    (pdsh, *_) = [one for one in started if one.name().startswith("pdsh")]
    pdsh.kill()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [cut_session, kill_pdsh])
def test_a_host_loses_the_connection_that_started_it(three_hosts, tmp_path, cut):
    """The second one's launcher has no parent any more, or nobody reads rank 0: the run is saved, and ends on both."""
    output, hostfile = tmp_path / "run", hostfile_of(three_hosts, 2, tmp_path)
    env_file = str(three_hosts.hostfile.parents[1] / "deepspeed_env")
    command = [str(BIN / "deepspeed"), "--hostfile", hostfile, *train(output), "--trainer.max_steps", "100000"]
    with (tmp_path / "said").open("w") as said:
        launched = subprocess.Popen(
            three_hosts.hosts[0].command(command),
            env=environment() | {"DS_ENV_FILE": env_file},
            stdout=said,
            stderr=said,
        )
    try:
        while not (output / "metrics.jsonl").exists():
            assert launched.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        below = [below_sshd(host) for host in three_hosts.hosts[:2]]
        ranks = [one for _, started in below for one in started]
        assert sum("run/pretrain.py" in one.cmdline()[:3] for one in ranks) == 2
        cut(launched, below[1][0])
        assert not psutil.wait_procs(ranks, timeout=60)[1]
    finally:
        for process in [*psutil.Process(launched.pid).children(recursive=True), launched]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may just end by itself
                process.kill()
        launched.wait()
    assert checkpoint.newest(output, warn=pytest.fail)
    if cut is cut_session:
        assert "the launcher of this rank is gone" in (output / "logs" / "rank1.log").read_text()


def below_sshd(host) -> tuple[psutil.Process, list[psutil.Process]]:
    """The host's end of the connection, and what it has started."""
    first = psutil.Process(host.first_process)
    (session,) = [one for one in first.children(recursive=True) if "notty" in " ".join(one.cmdline())]
    return session, session.children(recursive=True)
