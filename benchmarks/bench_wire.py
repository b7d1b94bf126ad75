"""Do the bytes that metrics() counts agree with the bytes that really leave each rank?

    sudo python benchmarks/bench_wire.py

ResNet-50's gradients (random numbers in the real layout) in DDP's buckets of 25 MiB, averaged in the
ways of exchange_arms.py (hierarchical: two nodes, and what moves inside them counts); for PyTorch's own
hooks the bytes are compared with the formula of a ring all-reduce.

Every rank runs in a network namespace of its own, connected by one veth pair to a bridge in one more
namespace; nothing of the machine's own network is touched, and the namespaces are removed at the end,
also after a failure. Gloo's file store needs no network, so what leaves a rank's interface is its
training traffic alone. The kernel's counters of that interface are read before and after the counted
steps, while no rank sends.

From the transmitted bytes, 66 bytes are subtracted for each transmitted packet: Ethernet 14, IPv4 20,
TCP 20 and 12 for TCP's timestamps. A pure acknowledgement is a packet of just these 66 bytes, so this
takes it out whole. What is left is what Gloo wrote to its sockets: payloads plus Gloo's own small
messages, and retransmitted data, if any (counted beside).

Segmentation offload is switched off, so that a packet is an Ethernet frame of at most 1514 bytes as on
a real wire. Where that fails, the counters see larger packets with one header each, which the
subtraction treats as correctly; only `frame_bytes_per_step` is then smaller than on a real wire.

Without root or `ip` (--network loopback) the counters of the machine's `lo` are read instead: the sum
over all ranks, and everything else that uses `lo` meanwhile counts, too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exchange_arms import ARMS, EXCHANGES, HIERARCHICAL, make_arms, shapes_of
from timing import RESULTS, goal, system_metadata, write

WARM_UP_STEPS = (
    3  # the first comparison of the ranks, the second process group, PowerSGD's dense steps
)
QUIET_S = 0.3  # until the last acknowledgements are out
NETWORK = "192.0.2"  # reserved for documentation (RFC 5737): inside the namespaces only
INTERFACE = "eth0"  # of each rank, inside its namespace
TOKEN_BUCKET = ("burst", "128kb", "latency", "50ms")
GOAL_PERCENT = 5.0


# ---- one rank


def run_rank(
    rank: int,
    world_size: int,
    arm_names: list[str],
    steps: int,
    density: float,
    shapes: list[list[int]],
    interface: str,
    folder: str,
) -> None:
    """Average gradients, and tell the parent through stdout; wait for it on stdin."""
    if interface != "lo":
        switch_off_offload(interface)
    join(rank, world_size, interface, folder)
    arms = make_arms(arm_names, shapes, density)
    gradient = torch.randn(next(iter(arms.values())).buckets.numel)
    for arm in arms.values():
        counted = 0.0
        for step in range(WARM_UP_STEPS + steps):
            if step == WARM_UP_STEPS:
                answer_count(interface)
                counted = 0.0
            arm.buckets.fill(gradient)
            arm.average()
            counted += arm.bytes_sent(world_size)[0]
        answer_count(interface)
        say({"bytes_sent": counted, "counted_by": arm.bytes_sent(world_size)[1]})
        arm.drop()
    end_rank()  # no rank leaves before all have been counted


def end_rank() -> None:
    """Wait until the parent has heard all ranks; leave the group."""
    sys.stdin.readline()
    dist.destroy_process_group()
    # For Gloo's threads, which may end the process otherwise: examples/processes.py.
    time.sleep(0.1)


def join(rank: int, world_size: int, interface: str, folder: str) -> None:
    """Make this process one rank of a Gloo group."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)  # the ranks share few cores
    torch.manual_seed(rank)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def answer_count(interface: str) -> None:
    """Wait until the parent asks, tell the counters, wait until all ranks have."""
    say("ready")
    sys.stdin.readline()
    say(counters(interface))
    sys.stdin.readline()


def say(message: Any) -> None:
    """Send one message to the parent."""
    print(json.dumps(message), flush=True)


def counters(interface: str) -> dict[str, int]:
    """Return what this namespace's kernel has counted so far."""
    devices = Path("/proc/net/dev").read_text(encoding="ascii")
    fields = next(line for line in devices.splitlines() if line.strip().startswith(f"{interface}:"))
    numbers = [int(number) for number in fields.split(":")[1].split()]
    snmp = Path("/proc/net/snmp").read_text(encoding="ascii")
    names, values = (line.split()[1:] for line in snmp.splitlines() if line.startswith("Tcp:"))
    tcp = dict(zip(names, map(int, values)))
    return {"bytes": numbers[8], "packets": numbers[9], "retransmitted": tcp["RetransSegs"]}


def switch_off_offload(interface: str) -> None:
    """Have the kernel cut the stream into Ethernet frames before the interface counts them."""
    siocethtool = 0x8946
    set_tso, set_gso = 0x1F, 0x24  # linux/ethtool.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in (set_tso, set_gso):
            value = bytearray(struct.pack("II", command, 0))
            address = (ctypes.c_char * len(value)).from_buffer(value)
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(address))
            with contextlib.suppress(OSError):  # allowed, see the docstring
                fcntl.ioctl(control, siocethtool, request)


# ---- the network


class Namespaces:
    """One namespace per rank, and one with the bridge between them.

    rate: of every link in either direction, in tc's spelling ("1gbit"): a token bucket at both ends of
    each veth pair. None: as fast as the machine is.
    """

    interface = INTERFACE

    def __init__(self, world_size: int, rate: str | None = None) -> None:
        self.rate = rate
        self.hub = f"cddp-{os.getpid()}-hub"
        self.ranks = [f"cddp-{os.getpid()}-{rank}" for rank in range(world_size)]

    def __enter__(self) -> Namespaces:
        try:
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _create(self) -> None:
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        for rank, name in enumerate(self.ranks):
            ip("netns", "add", name)
            # Before the interfaces exist: IPv6 would send neighbour discovery of its own.
            disable = "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 || true"
            ip("netns", "exec", name, "sh", "-c", disable)
            port = f"port{rank}"
            peer = ("peer", "name", INTERFACE, "netns", name)
            ip("-n", self.hub, "link", "add", port, "type", "veth", *peer)
            ip("-n", self.hub, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{NETWORK}.{rank + 1}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
            if self.rate is not None:
                bucket = ("root", "tbf", "rate", self.rate, *TOKEN_BUCKET)
                for namespace, device in ((name, INTERFACE), (self.hub, port)):
                    tc = ("tc", "qdisc", "add", "dev", device, *bucket)
                    ip("netns", "exec", namespace, *tc)

    def command(self, rank: int) -> list[str]:
        """Return what starts a program as this rank."""
        return ["ip", "netns", "exec", self.ranks[rank]]

    def __exit__(self, *_: object) -> None:
        for name in (*self.ranks, self.hub):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Loopback:
    """The machine's own loopback interface."""

    interface = "lo"

    def __enter__(self) -> Loopback:
        return self

    def command(self, rank: int) -> list[str]:
        """Return what starts a program as this rank: nothing."""
        return []

    def __exit__(self, *_: object) -> None:
        pass


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"bench_wire: ip {' '.join(arguments)}: {result.stderr.strip()}")


def can_use_namespaces() -> bool:
    """Return whether this process may create them."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with Namespaces(1):
            return True
    except RuntimeError as error:
        print(f"{error}; falling back to loopback", file=sys.stderr)
        return False


def header_bytes() -> int:
    """Return the bytes of a packet's headers: Ethernet, IPv4, TCP, and TCP's timestamps when on."""
    timestamps = Path("/proc/sys/net/ipv4/tcp_timestamps").read_text(encoding="ascii").strip()
    return 14 + 20 + 20 + (12 if timestamps != "0" else 0)


# ---- the parent


class Rank:
    """A running rank, seen from the parent."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> Any:
        """Return the rank's next message."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"bench_wire: a rank ended with exit code {self.process.wait()}; its error is above"
            )
        return json.loads(line)

    def go_on(self) -> None:
        """Let the rank continue."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def started(
    network: Namespaces | Loopback, script: str, world_size: int, *arguments: Any
) -> Iterator[list[Rank]]:
    """Run `script --as-rank [rank, world_size, *arguments, interface, folder]` on every rank; on the way out none is left."""
    ranks: list[Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                given = [rank, world_size, *arguments, network.interface, folder]
                program = [sys.executable, script, "--as-rank", json.dumps(given)]
                ranks.append(Rank([*network.command(rank), *program]))
            yield ranks
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()


def measure(
    network_class: type[Namespaces] | type[Loopback],
    world_size: int,
    arms: list[str],
    steps: int,
    density: float,
    layout: str,
) -> Iterator[dict[str, Any]]:
    """Yield a row per arm: what the ranks say they sent, and what their interfaces sent."""
    network = Namespaces(world_size) if network_class is Namespaces else Loopback()
    arguments = (arms, steps, density, shapes_of(layout))
    with network, started(network, __file__, world_size, *arguments) as ranks:
        for arm in arms:
            before, after = count(ranks), count(ranks)
            sent = [{key: b[key] - a[key] for key in a} for a, b in zip(before, after)]
            if network_class is Loopback:  # every rank has read the same counters, which saw all
                sent = [{key: n / world_size for key, n in one.items()} for one in sent]
            yield row_of(arm, steps, sent, [rank.hear() for rank in ranks])
        leave(ranks)


def row_of(
    arm: str, steps: int, sent: list[dict[str, float]], counted: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return one arm's row from the differences of the ranks' counters and what the ranks say."""
    world_size = len(sent)
    payload = [one["bytes"] - header_bytes() * one["packets"] for one in sent]
    expected = [one["bytes_sent"] for one in counted]
    percents = [100 * (there / here - 1) for there, here in zip(payload, expected)]
    per_step = world_size * steps
    return {
        "ranks": world_size,
        "arm": arm,
        "steps": steps,
        "counted_by": counted[0]["counted_by"],
        "counted_bytes_per_step": round(sum(expected) / per_step),
        "sent_bytes_per_step": round(sum(payload) / per_step),
        "difference_percent": round(100 * (sum(payload) / sum(expected) - 1), 4),
        "worst_rank_percent": round(max(percents, key=abs), 4),
        "frame_bytes_per_step": round(sum(one["bytes"] for one in sent) / per_step),
        "packets_per_step": round(sum(one["packets"] for one in sent) / per_step, 1),
        "retransmitted_segments": round(sum(one["retransmitted"] for one in sent)),
    }


def leave(ranks: list[Rank]) -> None:
    """Let all ranks end."""
    for rank in ranks:
        rank.go_on()
    for rank in ranks:
        if rank.process.wait(60) != 0:
            raise RuntimeError("bench_wire: a rank failed at the end; its error is above")


def count(ranks: list[Rank]) -> list[dict[str, int]]:
    """Read every rank's counters while none of them sends."""
    for rank in ranks:
        if rank.hear() != "ready":
            raise RuntimeError("bench_wire: expected a rank to be ready")
    time.sleep(QUIET_S)
    for rank in ranks:
        rank.go_on()
    found = [rank.hear() for rank in ranks]
    for rank in ranks:
        rank.go_on()
    return found


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    print(
        f"{row['ranks']} ranks, {row['arm']:<12} counted {row['counted_bytes_per_step']:>11,} B/step, sent "
        f"{row['sent_bytes_per_step']:>11,} B/step: {row['difference_percent']:+.3f} % (worst rank "
        f"{row['worst_rank_percent']:+.3f} %); with headers {row['frame_bytes_per_step']:,} B in "
        f"{row['packets_per_step']:,.0f} packets; {row['retransmitted_segments']} retransmitted",
        flush=True,
    )


def end(number: int, frame: object) -> None:
    """Leave through the clean-up."""
    sys.exit(128 + number)


def main() -> int:
    """Run all arms at each world size, print the agreement, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--arms", nargs="+", choices=(*ARMS, HIERARCHICAL), default=(*ARMS, HIERARCHICAL)
    )
    parser.add_argument("--layout", choices=["resnet50", "short"], default="resnet50")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--network", choices=["auto", "namespaces", "loopback"], default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_wire.json")
    parser.add_argument("--as-rank", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        run_rank(*options.as_rank)
        return 0

    signal.signal(signal.SIGTERM, end)
    system = system_metadata()
    if options.network == "auto":
        options.network = "namespaces" if can_use_namespaces() else "loopback"
    network = Namespaces if options.network == "namespaces" else Loopback
    print(f"network: {options.network}")
    rows = []
    for world_size in options.ranks:
        arguments = (list(options.arms), options.steps, options.density, options.layout)
        for row in measure(network, world_size, *arguments):
            rows.append(row)
            show(row)
    goals = [
        goal(
            f"{row['arm']}: |sent - counted| of the worst of {row['ranks']} ranks, per cent",
            abs(row["worst_rank_percent"]),
            at_most=GOAL_PERCENT,
        )
        for row in rows
        if row["arm"] in EXCHANGES
    ]
    write(
        {
            "benchmark": "bench_wire",
            "title": "The bytes on the wire",
            "system": system,
            "settings": {
                "network": "one veth pair per rank" if network is Namespaces else "loopback",
                "backend": "gloo",
                "layout": options.layout,
                "bucket_mib": "25 (PowerSGD: one bucket)",
                "density": options.density,
                "value_format": "bf16",
                "subtracted_per_packet_bytes": header_bytes(),
            },
            "goals": goals,
            "rows": rows,
        },
        options.output,
    )
    return 0 if all(entry["reached"] for entry in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
