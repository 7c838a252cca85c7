from __future__ import annotations

import pytest

from loratune.planning.hardware.cluster import find_cluster, find_machine
from loratune.planning.hardware.devices import DEVICES
from loratune.run.errors import RecipeError


def sizes(spec: str) -> list[tuple[int, int]]:
    return [(part.fabric.nodes, part.fabric.devices_per_node) for part in find_cluster(spec).doublings()]


def test_devices_and_nodes_are_read_in_any_spelling() -> None:
    one, two = find_cluster("8xH100 80GB"), find_cluster("2x8xh100-80gb")
    assert one.device is two.device is DEVICES["h100-80gb"]
    assert (one.fabric.nodes, one.fabric.devices_per_node, one.size) == (1, 8, 8)
    assert (two.fabric.nodes, two.fabric.devices_per_node, two.size) == (2, 8, 16)
    assert find_cluster("4xrtx4090").size == 4


def test_the_links_are_the_usual_ones_or_those_asked_for() -> None:
    def links(spec: str, *names: str) -> tuple[str, str]:
        fabric = find_cluster(spec, names).fabric
        return fabric.within.name, fabric.between.name

    assert links("2x8xh100-80gb") == ("nvlink4", "infiniband-ndr")
    assert links("2x8xa100-80gb") == ("nvlink3", "infiniband-hdr")
    assert links("2x8xl4") == ("pcie4", "ethernet-100g")
    assert links("2x8xh100-80gb", "ethernet-25g", "pcie5") == ("pcie5", "ethernet-25g")


def test_the_series_up_to_a_cluster_doubles_devices_and_then_nodes() -> None:
    assert sizes("8xl4") == [(1, 1), (1, 2), (1, 4), (1, 8)]
    assert sizes("6xl4") == [(1, 1), (1, 2), (1, 4), (1, 6)]
    assert sizes("3x2xl4") == [(1, 1), (1, 2), (2, 2), (3, 2)]
    assert sizes("2x1xl4") == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("device", "devices", "links", "message"),
    [
        (None, "h100-80gb", (), "is malformed"),
        (None, "0xl4", (), "is malformed"),
        (None, "8xl5", (), "unknown --devices l5"),
        (None, "8xl4", ("ethernet-100g",), "is one node"),
        (None, "2x8xl4", ("ethernet-100g", "infiniband-ndr"), "connect the same devices"),
        (None, "2x8xl4", ("ethernet-1g",), "unknown --interconnect ethernet-1g"),
        (None, None, ("pcie5",), "needs devices"),
        ("l4", None, ("pcie5",), "needs devices"),
        ("l4", "8xl4", (), "leave one of them out"),
    ],
)
def test_impossible_clusters_are_refused(
    device: str | None, devices: str | None, links: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        find_machine(device, devices, links)


def test_one_device_many_or_none() -> None:
    assert find_machine(None, None) == (None, None)
    assert find_machine("l4", None) == (DEVICES["l4"], None)
    device, cluster = find_machine(None, "2xl4")
    assert device is DEVICES["l4"]
    assert cluster == find_cluster("2xl4")
