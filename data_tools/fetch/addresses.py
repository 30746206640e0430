"""Where the download may connect to: public addresses, and what the options allow and refuse.

Standard library only: it runs in img2dataset's environment.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

NOT_PUBLIC, REFUSED = "not_public_address", "refused_address"  # reasons
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
# Inside 2000::/3, but special (IANA's registry): protocol assignments with Teredo, documentation, 6to4.
_SPECIAL_V6 = tuple(map(ipaddress.ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
# is_global is True for these, for the first two in some Python versions: protocol assignments, 6to4 relays, and the
# address at which Azure's machines reach their host, which serves their settings.
_SPECIAL_V4 = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # how an IPv6-only network reaches IPv4
_LISTED = re.compile(rf"guard: (?:{NOT_PUBLIC}|{REFUSED}) ([\w.:%,]+)")


def check_networks(option: str, networks: tuple[str, ...]) -> None:
    """Raises ValueError, naming the option, for a network that is none."""
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ValueError(f"{option}={network}: {error}; write 10.1.0.0/16 or ::1/128") from None


@lru_cache(65_536)
def why_not(address: str, allow: tuple[str, ...] = (), refuse: tuple[str, ...] = ()) -> str:
    """The reason why a numeric address is forbidden; "": it is not. An address in one of the networks `refuse` is, in
    whatever form it is written; otherwise one that is public or in one of the networks `allow` is not."""
    try:
        ip: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return NOT_PUBLIC
    if any(each in network for network in map(ipaddress.ip_network, refuse) for each in (ip, *_inside(ip))):
        return REFUSED
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    allowed = any(ip in network for network in map(ipaddress.ip_network, allow))
    return "" if allowed or _is_public(ip) else NOT_PUBLIC


def may_connect(address: str, allow: tuple[str, ...] = (), refuse: tuple[str, ...] = ()) -> bool:
    return not why_not(address, allow, refuse)


def may_connect_now(message: str | None, allow: tuple[str, ...], refuse: tuple[str, ...]) -> bool:
    """Whether a row's error message names a forbidden address that these networks no longer forbid."""
    found = _LISTED.search(message or "")
    return found is not None and any(may_connect(each, allow, refuse) for each in found[1].split(","))


def _inside(ip: Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses to which an IPv6 address leads: mapped, by NAT64, by 6to4 and by Teredo."""
    if not isinstance(ip, ipaddress.IPv6Address):
        return []
    nat64 = ipaddress.IPv4Address(ip.packed[12:]) if ip in _NAT64 else None
    return [each for each in (ip.ipv4_mapped, nat64, ip.sixtofour, *(ip.teredo or ())) if each is not None]


def _is_public(ip: Address) -> bool:
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return _is_public(ipaddress.IPv4Address(ip.packed[12:]))
        return ip in _GLOBAL_V6 and not any(ip in network for network in _SPECIAL_V6)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in net for net in _SPECIAL_V4)
