"""Two hosts on one machine: network namespaces, each with a name and an address, and a switch that can cut one off.

    @pytest.fixture
    def hosts(tmp_path):
        with two_hosts(tmp_path) as hosts:
            yield hosts

    process = hosts[1].start(sys.executable, "-m", ...)      # knows itself as node-1, and the other as node-0
    hosts[1].cut()                                           # as if the cable were pulled
    hosts[1].mend()

Skips the test where namespaces are not permitted. Processes of the hosts are ended with them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field

import pytest

from tests.harness.patience import PATIENCE_S

ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
"""In a mount and a name space of its own: the names of the hosts, and which one this is."""


@dataclass
class Host:
    """One of the hosts."""

    name: str
    space: str
    switch: str
    names: str
    processes: list = field(default_factory=list)

    def start(self, *words, log, **env):
        """A process on this host, the first of a session of its own; stdout and stderr go to a file."""
        inside = ["ip", "netns", "exec", self.space, "unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh"]
        outer = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with open(log, "w") as file:
            process = subprocess.Popen(
                [*inside, self.names, self.name, *map(str, words)],
                stdout=file,
                stderr=file,
                env=outer | env,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut(self):
        ip("-n", self.switch, "link", "set", self.name, "down")

    def mend(self):
        ip("-n", self.switch, "link", "set", self.name, "up")

    def pids(self):
        """All processes on this host."""
        return [int(pid) for pid in ip("netns", "pids", self.space).split()]

    def kill(self, pids=None):
        for pid in self.pids() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


@contextlib.contextmanager
def two_hosts(folder):
    """node-0 and node-1."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
    spaces = [f"zoo-{os.getpid()}-{part}" for part in ("switch", "0", "1")]
    hosts = [Host(f"node-{i}", spaces[1 + i], spaces[0], str(names)) for i in range(2)]
    try:
        try:
            build(spaces, hosts)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                host.kill()
            for process in host.processes:
                process.wait()
        for space in spaces:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                ip("netns", "delete", space)


def build(spaces, hosts):
    switch = spaces[0]
    for space in spaces:
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
    ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    ip("-n", switch, "link", "set", "bridge", "up")
    for number, host in enumerate(hosts, start=1):
        ip("-n", switch, "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.space)
        ip("-n", switch, "link", "set", host.name, "master", "bridge")
        ip("-n", switch, "link", "set", host.name, "up")
        ip("-n", host.space, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        ip("-n", host.space, "link", "set", "eth0", "up")
    enter = ["ip", "netns", "exec", hosts[0].space, "unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh"]
    subprocess.run(
        [*enter, hosts[0].names, "node-0", "true"], check=True, capture_output=True, text=True, timeout=PATIENCE_S
    )
