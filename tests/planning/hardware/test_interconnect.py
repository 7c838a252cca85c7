"""Links and collectives, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratune.planning.hardware.devices import DEVICES
from loratune.planning.hardware.interconnect import CALL_SECONDS, LINK_EFFICIENCY, LINKS, Fabric, find_link
from loratune.run.errors import RecipeError

NVLINK, NDR, ETHERNET = LINKS["nvlink4"], LINKS["infiniband-ndr"], LINKS["ethernet-100g"]


def fabric(nodes: int, each: int) -> Fabric:
    return Fabric(nodes=nodes, devices_per_node=each, within=NVLINK, between=NDR)


def test_every_link_has_plausible_figures_and_a_source() -> None:
    for name, link in LINKS.items():
        assert name == link.name == name.lower()
        assert 1e9 <= link.bytes_per_second <= 1e12
        assert 1e-6 <= link.hop_seconds <= 1e-4
        assert link.source
    assert all(LINKS[device.link].scope == "devices" for device in DEVICES.values())


def test_datasheets_count_both_directions_and_networks_one() -> None:
    assert NVLINK.bytes_per_second == 450e9
    assert NDR.bytes_per_second == 50e9


def test_a_ring_of_four_by_hand() -> None:
    rate = 450e9 * 235 / 300
    gathered = fabric(1, 4).all_gather_seconds(1e9)
    assert gathered == pytest.approx(0.75 * 1e9 / rate + 3 * 3.4e-6 + 8.4e-6, rel=1e-12)
    reduced = fabric(1, 4).all_reduce_seconds(1e9)
    assert reduced == pytest.approx(1.5 * 1e9 / rate + 6 * 3.4e-6 + 8.4e-6, rel=1e-12)


def test_a_ring_over_two_nodes_of_eight_by_hand() -> None:
    both = fabric(2, 8)
    assert both.bytes_per_second == pytest.approx(LINK_EFFICIENCY * 8 * 50e9), (
        "eight ports together are slower than one NVLink"
    )
    hops = 30 - 4
    assert both.all_reduce_seconds(0) == pytest.approx(CALL_SECONDS + hops * 3.4e-6 + 4 * 14e-6, rel=1e-12)


def test_a_shared_port_is_one_for_all_devices_of_a_node() -> None:
    shared = replace(fabric(2, 8), between=ETHERNET)
    assert shared.bytes_per_second == pytest.approx(LINK_EFFICIENCY * 12.5e9)
    assert replace(shared, devices_per_node=1).bytes_per_second == pytest.approx(LINK_EFFICIENCY * 12.5e9)


def test_one_device_sends_nothing() -> None:
    assert fabric(1, 1).all_reduce_seconds(1e12) == fabric(1, 1).all_gather_seconds(1e12) == 0.0


@pytest.mark.parametrize("operation", ["all_reduce_seconds", "all_gather_seconds"])
def test_more_ranks_and_more_bytes_take_longer_and_more_bandwidth_does_not(operation: str) -> None:
    times = [getattr(fabric(1, n), operation)(1e8) for n in (1, 2, 4, 8)]
    assert times == sorted(times)
    assert getattr(fabric(1, 8), operation)(2e8) > getattr(fabric(1, 8), operation)(1e8)
    faster = replace(fabric(1, 8), within=replace(NVLINK, bytes_per_second=900e9))
    assert getattr(faster, operation)(1e8) < getattr(fabric(1, 8), operation)(1e8)


def test_the_message_about_an_unknown_link_names_the_nearest_one() -> None:
    assert find_link("Infiniband NDR") is NDR
    with pytest.raises(RecipeError, match="unknown --interconnect nvlink9") as error:
        find_link("nvlink9")
    assert "nvlink" in error.value.fix
