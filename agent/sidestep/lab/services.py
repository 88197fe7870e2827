"""Services for pods outside the mesh: nftables rules of a node, as kube-proxy would make them.

A connection to a cluster address is sent to a random ready endpoint (DNAT in prerouting and output of the node); one
without endpoints is refused. A pod that reaches itself through its Service gets the node's address as source, or its
own stack would drop the answer. `ruleset` is pure; the whole table is replaced in one transaction, so no packet ever
sees half of it. A meshed pod's engine chooses endpoints itself: its packets never carry a cluster address.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TABLE = "sidestep_lab"
SERVICE_LABEL = "kubernetes.io/service-name"

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a Service at one of its addresses, with what is behind it."""

    address: str
    protocol: str  # tcp, udp
    port: int
    endpoints: tuple[tuple[str, int], ...]
    name: str


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of an EndpointSlice. `ports`: name -> number."""

    service: str
    family: int
    ports: tuple[tuple[str, int], ...]
    ready: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """What is kept of a Service. `addresses` is empty for a headless one."""

    addresses: tuple[str, ...]
    ports: tuple[tuple[str, str, int], ...]  # name, protocol, number
    headless: bool


def service_of(obj: Object) -> Service:
    """Projects a Service object."""
    spec = obj.get("spec") or {}
    addresses = [text for text in spec.get("clusterIPs") or [spec.get("clusterIP")] if text and text != "None"]
    return Service(
        addresses=tuple(addresses),
        ports=tuple(
            (port.get("name") or "", (port.get("protocol") or "TCP").lower(), int(port["port"]))
            for port in spec.get("ports") or ()
        ),
        headless=spec.get("clusterIP") == "None",
    )


def slice_of(obj: Object) -> Slice:
    """Projects an EndpointSlice object."""
    meta = obj["metadata"]
    service = (meta.get("labels") or {}).get(SERVICE_LABEL, "")
    ready = [
        address
        for endpoint in obj.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") is not False
        for address in endpoint.get("addresses") or ()
    ]
    return Slice(
        service=f"{meta['namespace']}/{service}" if service else "",
        family=6 if obj.get("addressType") == "IPv6" else 4,
        ports=tuple((port.get("name") or "", int(port["port"])) for port in obj.get("ports") or () if port.get("port")),
        ready=tuple(sorted(ready)),
    )


def ports(services: Mapping[str, Service], slices: Iterable[Slice]) -> Iterator[Port]:
    """Every port of every Service with the endpoints of the address's family."""
    by_service: dict[str, list[Slice]] = {}
    for item in slices:
        by_service.setdefault(item.service, []).append(item)
    for key, service in sorted(services.items()):
        for address in service.addresses:
            family = ipaddress.ip_address(address).version
            for name, protocol, number in service.ports:
                endpoints = {
                    (endpoint, target)
                    for item in by_service.get(key, ())
                    if item.family == family
                    for port_name, target in item.ports
                    if port_name == name
                    for endpoint in item.ready
                }
                yield Port(address, protocol, number, tuple(sorted(endpoints)), key)


def ruleset(found: Iterable[Port]) -> str:
    """The table as `nft -f` reads it."""
    nat, refuse = [], []
    own: dict[int, set[str]] = {4: set(), 6: set()}
    for port in found:
        family = ipaddress.ip_address(port.address).version
        word = "ip" if family == 4 else "ip6"
        match = f"{word} daddr {port.address} {port.protocol} dport {port.port}"
        if not port.endpoints:
            answer = "reject with tcp reset" if port.protocol == "tcp" else "reject"
            refuse.append(f"{match} {answer}")
            continue
        targets = ", ".join(f"{index} : {address} . {number}" for index, (address, number) in enumerate(port.endpoints))
        choice = f"numgen random mod {len(port.endpoints)} map {{ {targets} }}"
        nat.append(f"{match} dnat {word} to {choice}")
        own[family].update(address for address, _ in port.endpoints)
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for family, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        elements = ", ".join(f"{address} . {address}" for address in sorted(own[family]))
        body = f" elements = {{ {elements} }}" if elements else ""
        lines.append(f"  set hairpin{family} {{ type {kind} . {kind};{body} }}")
    lines.append("  chain services {")
    lines += [f"    {rule}" for rule in nat]
    lines.append("  }")
    for hook, priority in (("prerouting", "dstnat"), ("output", "-100")):
        lines.append(f"  chain {hook} {{ type nat hook {hook} priority {priority}; jump services; }}")
    lines.append("  chain refuse {")
    lines += [f"    {rule}" for rule in refuse]
    lines.append("  }")
    for hook in ("forward", "output"):
        lines.append(f"  chain filter_{hook} {{ type filter hook {hook} priority filter; jump refuse; }}")
    lines += [
        "  chain postrouting {",
        "    type nat hook postrouting priority srcnat;",
        "    ct status dnat ip saddr . ip daddr @hairpin4 masquerade",
        "    ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def hosts(services: Mapping[str, Service], slices: Iterable[Slice], domain: str) -> str:
    """The names of Services as a hosts file: cluster addresses, or the ready endpoints of a headless one."""
    lines = []
    endpoints: dict[str, set[str]] = {}
    for item in slices:
        endpoints.setdefault(item.service, set()).update(item.ready)
    for key, service in sorted(services.items()):
        namespace, name = key.split("/")
        for address in sorted(endpoints.get(key, ())) if service.headless else service.addresses:
            lines.append(f"{address} {name}.{namespace}.svc.{domain}")
    return "\n".join(lines) + "\n"
