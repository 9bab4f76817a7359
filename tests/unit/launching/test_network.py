"""The interface that gloo and NCCL use, from the addresses of a node."""

import psutil
import pytest

from students.launching.network import (
    GLOO,
    NCCL,
    interface_of,
    interface_settings,
    interfaces_here,
)

NODE = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["10.77.0.12", "fe80::1%eth0", "02:fc:00:00:00:01"],
    "eth0.12": ["10.77.12.12"],
    "ib0": ["192.168.5.12", "fd00::12"],
    "docker0": ["172.17.0.1"],
    "ifb0": ["ee:31:e9:c3:41:e1"],
    "down": [],
}


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.77.0.12", "eth0"),
        ("10.77.12.12", "eth0.12"),
        ("192.168.5.12", "ib0"),
        ("127.0.0.1", "lo"),
        ("fd00::12", "ib0"),
        ("fe80::1", "eth0"),
        ("::1", "lo"),
        ("10.77.0.1", None),  # the beginning of another address
        ("127.0.1.1", None),  # what a host name resolves to on Debian
        ("203.0.113.9", None),  # translated on the way
        ("", None),
    ],
)
def test_the_interface_of_an_address_is_found(address: str, interface: str | None) -> None:
    assert interface_of(address, NODE) == interface


def test_every_address_of_this_machine_is_found() -> None:
    here = interfaces_here()
    assert here.keys() == psutil.net_if_addrs().keys()
    assert interface_of("127.0.0.1", here) is not None


def test_gloo_and_nccl_get_the_interface_and_no_other_one_that_begins_alike() -> None:
    assert interface_settings("eth0", {}) == {GLOO: "eth0", NCCL: "=eth0"}


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({GLOO: "ib0"}, {NCCL: "=eth0"}),
        ({NCCL: "^docker"}, {GLOO: "eth0"}),
        ({GLOO: "ib0", NCCL: "ib"}, {}),
        ({GLOO: "", NCCL: ""}, {GLOO: "eth0", NCCL: "=eth0"}),
    ],
)
def test_the_choice_of_the_user_wins(environment: dict[str, str], settings: dict[str, str]) -> None:
    assert interface_settings("eth0", environment) == settings


def test_nothing_is_set_without_an_interface() -> None:
    assert interface_settings(None, {}) == {}
