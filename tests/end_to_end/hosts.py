"""Hosts on one machine: namespaces of network, processes, mounts and host name, an sshd in each, one bridge.

Whatever is made here lives in a temporary folder or in namespaces that end with their first process, and that ends
with the process that made it: nothing is left behind, even by SIGKILL. Needs root.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import ROOT, environment

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "unshare": "util-linux",
}
INTERFACE = "eth0"

SSHD = """Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PasswordAuthentication no
"""
SSH = """Host *
    IdentityFile /etc/ssh/key
    GlobalKnownHostsFile /etc/ssh/known_hosts
    BatchMode yes
    ConnectTimeout 5
    ServerAliveInterval 5
    ServerAliveCountMax 3
"""
# The first process of a host. Its own /etc/ssh, /etc/hosts, /run and /dev/shm, then the server.
BOOT = """hostname "$2"
mount --bind "$1/ssh" /etc/ssh
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs none /run && mkdir /run/sshd
mount -t tmpfs none /dev/shm
ip link set lo up
exec "$(command -v sshd)" -D -e
"""


def lacking() -> str | None:
    """Why there can be no hosts here, for a test to skip with; None where there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    packages = [package for program, package in PACKAGES.items() if not _which(program)]
    if packages:
        return f"needs apt packages {', '.join(packages)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    first_process: int

    def command(self, arguments: list[str], folder: Path = ROOT) -> list[str]:
        """The command line that runs `arguments` on this host, in `folder`."""
        enter = ["nsenter", "--target", str(self.first_process), "--net", "--mount", "--uts", "--pid"]
        return [*enter, "--", "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *arguments]


@dataclass(frozen=True)
class Cluster:
    hosts: list[Host]
    switch: int  # a process in the bridge's namespace
    hostfile: Path  # one slot a host

    def run(self, *arguments: str, on: int = 0, **variables: str) -> subprocess.CompletedProcess:
        """A command on host number `on`, to its end."""
        command = self.hosts[on].command(list(arguments))
        return subprocess.run(command, env=environment() | variables, capture_output=True, text=True, timeout=300)

    def plug(self, host: int, up: bool) -> None:
        """Put the cable of host number `host` in, or pull it."""
        _inside(self.switch, "ip", "link", "set", f"port{host}", "up" if up else "down")


@contextlib.contextmanager
def cluster(count: int, folder: Path) -> Iterator[Cluster]:
    """`count` hosts, host1 and up, that reach each other by ssh; gone at the end of the block."""
    addresses = {f"host{i}": f"10.77.0.{i}" for i in range(1, count + 1)}
    _write_files(folder, addresses)
    with contextlib.ExitStack() as stack:
        switch = _namespaces(stack, ["sleep", "infinity"])
        _inside(switch, "ip", "link", "add", "bridge", "type", "bridge")
        _inside(switch, "ip", "link", "set", "bridge", "up")
        hosts = []
        for name, address in addresses.items():
            log = stack.enter_context((folder / f"{name}.log").open("w"))
            first = _namespaces(stack, ["sh", "-ec", BOOT, "boot", str(folder), name], log)
            _connect(switch, len(hosts), first, address)
            hosts.append(Host(name, address, first))
        made = Cluster(hosts, switch, folder / "hostfile")
        for name in addresses:
            _wait_for_ssh(made, name)
        yield made


def _write_files(folder: Path, addresses: dict[str, str]) -> None:
    """What the hosts share: keys made for them alone, ssh's settings, their names."""
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / key], check=True)
    public = (ssh / "host_key.pub").read_text()
    (ssh / "known_hosts").write_text("".join(f"{name},{at} {public}" for name, at in addresses.items()))
    (ssh / "sshd_config").write_text(SSHD)
    (ssh / "ssh_config").write_text(SSH)
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in addresses))


def _namespaces(stack: contextlib.ExitStack, command: list[str], log: object = subprocess.DEVNULL) -> int:
    """Start `command` as the first process of new namespaces, which end with it and with this process."""
    unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    outer = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *unshare, *command],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    stack.callback(outer.wait)
    stack.callback(outer.kill)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + 10
    while not (found := children.read_text(encoding="utf-8").split()):
        if outer.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"namespaces for {command} could not be made")
        time.sleep(0.01)
    stack.callback(os.kill, int(found[0]), signal.SIGKILL)  # first, so that `outer` reaps it
    return int(found[0])


def _inside(process: int, *command: str) -> None:
    """Run a command in the network of a process."""
    subprocess.run(["nsenter", "--target", str(process), "--net", *command], check=True)


def _connect(switch: int, port: int, first: int, address: str) -> None:
    """A cable from the bridge to a host."""
    veth = ("type", "veth", "peer", "name", INTERFACE, "netns", str(first))
    _inside(switch, "ip", "link", "add", f"port{port}", *veth)
    _inside(switch, "ip", "link", "set", f"port{port}", "master", "bridge", "up")
    _inside(first, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
    _inside(first, "ip", "link", "set", INTERFACE, "up")


def _wait_for_ssh(made: Cluster, name: str) -> None:
    deadline = time.monotonic() + 30
    while (tried := made.run("ssh", name, "hostname")).stdout.strip() != name:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no ssh to {name}: {tried.stderr}")
        time.sleep(0.1)
