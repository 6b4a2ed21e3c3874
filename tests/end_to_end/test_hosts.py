"""Several hosts, as namespaces of this machine (hosts.py): the launches that cross them."""

import pytest
from hosts import INTERFACE, cluster, lacking
from launch import BIN, TOY, ZERO3, losses, pretrain

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


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_hostfile(three_hosts, one_host, tmp_path, count):
    """Over ssh and pdsh, ZeRO-3: the losses of one host."""
    output, hostfile = tmp_path / "run", hostfile_of(three_hosts, count, tmp_path)
    launcher = [str(BIN / "deepspeed"), "--hostfile", hostfile, "run/pretrain.py", "--deepspeed", ZERO3]
    env_file = str(three_hosts.hostfile.parents[1] / "deepspeed_env")
    done = three_hosts.run(*launcher, "--output", str(output), *OPTIONS, DS_ENV_FILE=env_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"x {count} rank(s)" in done.stdout
    assert_same_curve(output, one_host)
