"""Many devices of one kind: `8xh100-80gb`, or `2x8xh100-80gb` for two nodes of eight."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratune.planning.hardware.devices import Device, find_device
from loratune.planning.hardware.interconnect import LINKS, Fabric, find_link, usual_network
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPEC = re.compile(r"(?:([1-9]\d*)x)?([1-9]\d*)x([a-z].*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices of one kind and their links.

    Attributes:
        device: The kind of device.
        fabric: How many there are, on how many nodes, and the links.
    """

    device: Device
    fabric: Fabric

    @property
    def size(self) -> int:
        """The number of devices; each runs one rank."""
        return self.fabric.size

    def doublings(self) -> tuple[Cluster, ...]:
        """Return 1, 2, 4, … devices of a node, then 2, 4, … full nodes, and this cluster as the last."""
        counts = [(1, n) for n in _doubling(self.fabric.devices_per_node)]
        counts += [(nodes, self.fabric.devices_per_node) for nodes in _doubling(self.fabric.nodes) if nodes > 1]
        return tuple(
            replace(self, fabric=replace(self.fabric, nodes=nodes, devices_per_node=each)) for nodes, each in counts
        )


def _doubling(most: int) -> list[int]:
    """Return 1, 2, 4, … and `most`."""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def find_cluster(spec: str, interconnect: Sequence[str] = ()) -> Cluster:
    """Return the cluster that `--devices` and `--interconnect` describe.

    Args:
        spec: `NUMBERxNAME` or `NODESxNUMBERxNAME`.
        interconnect: Names of links to use instead of the usual ones: one within a node, one between nodes, or both.

    Raises:
        RecipeError: The description is malformed, or names an unknown device or a link that the cluster cannot have.
    """
    found = _SPEC.fullmatch(spec.strip())
    if found is None:
        raise RecipeError(
            f"--devices {spec} is malformed",
            fix="write NUMBERxNAME such as 8xh100-80gb, or NODESxNUMBERxNAME such as 2x8xh100-80gb",
        )
    device = find_device(found[3], option="--devices")
    links = [find_link(name) for name in interconnect]
    chosen = {link.scope: link for link in links}
    if len(chosen) < len(links):
        raise RecipeError(
            f"--interconnect {' and '.join(link.name for link in links)} connect the same devices",
            fix="give one link within a node and one between nodes",
        )
    nodes = int(found[1] or 1)
    if "nodes" in chosen and nodes == 1:
        raise RecipeError(
            f"--interconnect {chosen['nodes'].name} connects nodes, but --devices {spec} is one node",
            fix=f"--devices 2x{spec}, or leave --interconnect out",
        )
    within = chosen.get("devices", LINKS[device.link])
    return Cluster(
        device=device,
        fabric=Fabric(
            nodes=nodes,
            devices_per_node=int(found[2]),
            within=within,
            between=chosen.get("nodes", usual_network(within)),
        ),
    )


def find_machine(
    device: str | None, devices: str | None, interconnect: Sequence[str] = ()
) -> tuple[Device | None, Cluster | None]:
    """Return what to plan for: one named device, a cluster and its kind of device, or neither for this machine.

    Args:
        device: The value of `--device`.
        devices: The value of `--devices`.
        interconnect: The values of `--interconnect`.

    Raises:
        RecipeError: As `find_cluster`, or the options contradict each other.
    """
    if device is not None and devices is not None:
        raise RecipeError(
            f"--device {device} is one device, but --devices {devices} is several", fix="leave one of them out"
        )
    if devices is None:
        if interconnect:
            raise RecipeError(
                f"--interconnect {interconnect[0]} needs devices to connect", fix="add --devices, such as 8xh100-80gb"
            )
        return (None, None) if device is None else (find_device(device), None)
    cluster = find_cluster(devices, interconnect)
    return cluster.device, cluster
