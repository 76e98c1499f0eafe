"""Two hosts on this machine: namespaces of their own for network, names, mounts and processes, joined by one cable.

Killing a host's first process ends all of its processes, as a machine without power would.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = ("host-a", "host-b")
NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@dataclass(frozen=True)
class Host:
    """A host by the id of its first process."""

    name: str
    first: int

    def command(self, *words: str) -> list[str]:
        """The command, run on this host in the folder of this process."""
        return ["nsenter", "--target", str(self.first), "--all", f"--wdns={Path.cwd()}", *words]

    def run(self, *words: str) -> None:
        """Run a command there to its end."""
        subprocess.run(self.command(*words), check=True, capture_output=True)

    def kill(self) -> None:
        """Take its power."""
        os.kill(self.first, signal.SIGKILL)


def refused() -> str:
    """Why this machine allows no such hosts; empty where it does."""
    try:
        done = subprocess.run([*NAMESPACES, "ip", "link"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return done.stderr.strip()


@contextmanager
def two_hosts(folder: Path) -> Iterator[Sequence[Host]]:
    """host-a and host-b, which know each other by name."""
    addresses = {name: f"10.9.0.{number}" for number, name in enumerate(NAMES, start=1)}
    lines = [f"{address} {name}" for name, address in addresses.items()]
    (folder / "hosts").write_text("\n".join([*lines, "127.0.0.1 localhost", ""]))
    with ExitStack() as stack:
        hosts = []
        for name in NAMES:
            process = stack.enter_context(subprocess.Popen([*NAMESPACES, "sleep", "3600"]))
            stack.callback(process.kill)
            hosts.append(Host(name, _child(process.pid)))
            # a host that is killed leaves its end of the cable: without its network the other end would go, too
            stack.enter_context(Path(f"/proc/{hosts[-1].first}/ns/net").open())
        one, two = (str(host.first) for host in hosts)
        cable = ["ip", "link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two]
        subprocess.run(cable, check=True)
        for host in hosts:
            host.run("ip", "addr", "add", f"{addresses[host.name]}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
            host.run("ip", "link", "set", "lo", "up")
            host.run("hostname", host.name)
            host.run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
        yield hosts


def _child(parent: int) -> int:
    """Id of the one process that this one forks."""
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        if children := Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            return int(children[0])
        time.sleep(0.02)
    raise TimeoutError(f"process {parent} forked nothing")
