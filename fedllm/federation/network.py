"""A site's process reaches its own machine, its coordinator, and the hosts that its settings name: nobody else.

Python tells every look-up and connection to audit hooks, whichever library makes it; one that is not allowed is refused
before anything is sent. Libraries that connect outside of Python are not seen: a firewall is the stronger form.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import HUB
from fedllm.federation.settings import SiteSettings

_open: dict[str, frozenset[str]] = {}
"""`names`, once the network is closed; `addresses` that these have."""


def close(settings: SiteSettings, coordinator: Iterable[str] = ()) -> None:
    """From now on this process reaches the hosts in the settings, its coordinator, and its own machine. For good."""
    names = {*settings.hosts, *coordinator}
    if settings.endpoint is not None:
        names.add(str(urlsplit(settings.endpoint.url).hostname))
    if HUB not in names:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    first = not _open
    _open.update(names=frozenset(names), addresses=frozenset())
    if first:
        sys.addaudithook(_look)


def allowed(host: str) -> bool:
    """Whether this process may look up, or connect to, a host or an address."""
    names = _open["names"]
    if host in ("", "localhost", socket.gethostname()) or host in names:
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or host in _open["addresses"]:
        return True
    found = {str(row[4][0]) for name in names for row in _addresses(name)}
    _open["addresses"] |= found  # a name may have other addresses tomorrow
    return host in found


def _addresses(name: str) -> list[Any]:
    try:
        return socket.getaddrinfo(name, None)
    except OSError:
        return []


def _look(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else ""  # a path is a socket of this machine
    else:
        return
    host = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if isinstance(host, str) and not allowed(host):
        raise Refused("network", f"{host} is not among the hosts of this site's settings")
