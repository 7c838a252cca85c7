"""Links between devices: published bandwidths, and the seconds of collective operations over them.

A link's figure is its maker's peak, one way. Makers of GPUs print the sum of both directions, so it is halved here:
NVLink 4 is "900 GB/s", 450 in each. No collective reaches the peak; `LINK_EFFICIENCY` is what is assumed. Nothing here
has been measured by loratune.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal

from loratune.run.errors import RecipeError

LINK_EFFICIENCY = 235 / 300
"""The fraction of a link's peak that a collective reaches: 235 GB/s of an A100's 300, to which NCCL limits its own
model of an A100's rings (`ncclTopoTuneModel` in NCCL 2.8, src/graph/tuning.cc). Assumed for every link."""

CALL_SECONDS = 8.4e-6
"""Seconds to start one ring operation (NCCL 2.19, src/graph/tuning.cc: `baseLat`, ring, simple protocol)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection between devices.

    Attributes:
        name: Its name for `--interconnect`.
        scope: What it connects: the devices of a node, or nodes.
        bytes_per_second: Published peak of one port, one way.
        shared: Whether the devices of a node share one port; else each has its own.
        hop_seconds: Latency from one rank to the next (NCCL 2.19, src/graph/tuning.cc: `hwLat`, ring, simple protocol).
        source: Where the bandwidth was published.
    """

    name: str
    scope: Literal["devices", "nodes"]
    bytes_per_second: float
    shared: bool
    hop_seconds: float
    source: str


def _within(name: str, gigabytes: float, hop_seconds: float, source: str) -> Link:
    """Return a link within a node; `gigabytes` a second are both directions together, as in datasheets."""
    return Link(
        name=name,
        scope="devices",
        bytes_per_second=gigabytes * 1e9 / 2,
        shared=False,
        hop_seconds=hop_seconds,
        source=source,
    )


def _between(name: str, gigabits: float, source: str, *, shared: bool) -> Link:
    """Return a link between nodes; `gigabits` a second are one port's, one way."""
    return Link(
        name=name,
        scope="nodes",
        bytes_per_second=gigabits * 1e9 / 8,
        shared=shared,
        hop_seconds=14e-6,
        source=source,
    )


_NVLINK, _PCIE = 3.4e-6, 5.7e-6

LINKS = {
    link.name: link
    for link in (
        _within("nvlink5", 1800, _NVLINK, "NVIDIA, DGX B200 datasheet: 14.4 TB/s over 8 GPUs"),
        _within("nvlink4", 900, _NVLINK, "NVIDIA, H100 datasheet: NVLink 900 GB/s"),
        _within("nvlink3", 600, _NVLINK, "NVIDIA, A100 datasheet: NVLink 600 GB/s"),
        _within("pcie5", 128, _PCIE, "NVIDIA, H100 datasheet: PCIe Gen5 128 GB/s"),
        _within("pcie4", 64, _PCIE, "NVIDIA, A100 datasheet: PCIe Gen4 64 GB/s"),
        _between(
            "infiniband-ndr", 400, "NVIDIA, DGX H100 User Guide: a ConnectX-7 of 400 Gb/s for each GPU", shared=False
        ),
        _between(
            "infiniband-hdr", 200, "NVIDIA, DGX A100 User Guide: a ConnectX-6 of 200 Gb/s for each GPU", shared=False
        ),
        _between("ethernet-100g", 100, "IEEE 802.3: 100 Gb/s, one port per node", shared=True),
        _between("ethernet-25g", 25, "IEEE 802.3: 25 Gb/s, one port per node", shared=True),
        _between("ethernet-10g", 10, "IEEE 802.3: 10 Gb/s, one port per node", shared=True),
    )
}

_USUAL_NETWORK = {"nvlink5": "infiniband-ndr", "nvlink4": "infiniband-ndr", "nvlink3": "infiniband-hdr"}
"""The network between nodes of the makers' own systems, by the link between their devices. Others get Ethernet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """How ranks are connected.

    Attributes:
        nodes: How many nodes.
        devices_per_node: Devices of each node; a rank each.
        within: The link between the devices of a node.
        between: The link between nodes.
    """

    nodes: int
    devices_per_node: int
    within: Link
    between: Link

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.nodes * self.devices_per_node

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second that every rank sends, and receives, in a ring over all of them."""
        peak = self.within.bytes_per_second if self.devices_per_node > 1 else math.inf
        if self.nodes > 1:
            # A ring crosses from node to node once each way, and NCCL lays one ring through each port. So the ports of
            # a node together carry what one device's link carries inside (`busBw` in NCCL's src/graph/tuning.cc).
            ports = 1 if self.between.shared else self.devices_per_node
            peak = min(peak, ports * self.between.bytes_per_second)
        return LINK_EFFICIENCY * peak

    def all_reduce_seconds(self, num_bytes: float) -> float:
        """Return the seconds in which every rank gets the sum of the `num_bytes` of all ranks.

        A ring reduces and scatters, then gathers: 2(n−1) hops, in which each rank sends 2(n−1)/n of the bytes; no
        algorithm sends less (Patarasuk & Yuan 2009, J. Parallel Distrib. Comput. 69(2); NVIDIA/nccl-tests,
        doc/PERFORMANCE.md).
        """
        if self.size == 1:
            return 0.0
        hops, crossings = 2 * (self.size - 1), 2 * self.nodes if self.nodes > 1 else 0
        return self._latency(hops, crossings) + self._transfer(2 * (self.size - 1) / self.size * num_bytes)

    def all_gather_seconds(self, num_bytes: float) -> float:
        """Return the seconds in which every rank gets all `num_bytes`, of which each holds 1/n.

        A ring: n−1 hops, in which each rank sends (n−1)/n of the bytes (Thakur et al. 2005, Int. J. High Perform.
        Comput. Appl. 19(1); NVIDIA/nccl-tests, doc/PERFORMANCE.md).
        """
        if self.size == 1:
            return 0.0
        return self._latency(self.size - 1, self.nodes - 1) + self._transfer((self.size - 1) / self.size * num_bytes)

    def _latency(self, hops: int, crossings: int) -> float:
        crossings = min(hops, crossings)
        return CALL_SECONDS + (hops - crossings) * self.within.hop_seconds + crossings * self.between.hop_seconds

    def _transfer(self, num_bytes: float) -> float:
        return num_bytes / self.bytes_per_second


def usual_network(within: Link) -> Link:
    """Return the network between nodes to assume if none is named."""
    return LINKS[_USUAL_NETWORK.get(within.name, "ethernet-100g")]


def find_link(name: str) -> Link:
    """Return the link of this name.

    Raises:
        RecipeError: There is none in the table.
    """
    known = name.lower().replace("_", "-").replace(" ", "-")
    if known in LINKS:
        return LINKS[known]
    near = difflib.get_close_matches(known, LINKS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise RecipeError(f"unknown --interconnect {name}", fix=f"{hint}choose one of {', '.join(LINKS)}")
