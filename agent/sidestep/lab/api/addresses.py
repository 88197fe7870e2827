"""Cluster addresses of Services: which families, which addresses. Pure: the addresses in use are an argument.

As in Kubernetes: SingleStack (default) takes the first family asked for, IPv4 else; PreferDualStack and
RequireDualStack take both, the lab always has both. A headless Service says `None`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from sidestep.lab.api.errors import Problem

FIRST = 16  # below are those that are asked for by name: 1 the API, 10 DNS


@dataclass(frozen=True, slots=True)
class Ranges:
    """The service ranges of both families."""

    v4: IPv4Network
    v6: IPv6Network

    @classmethod
    def parse(cls, v4: str, v6: str) -> "Ranges":
        """From CIDR texts. Raises ValueError."""
        four, six = ip_network(v4), ip_network(v6)
        if not isinstance(four, IPv4Network) or not isinstance(six, IPv6Network):
            raise ValueError("needs one IPv4 and one IPv6 range")
        return cls(four, six)

    def of(self, family: str) -> IPv4Network | IPv6Network:
        """`IPv4` or `IPv6`."""
        return self.v4 if family == "IPv4" else self.v6


def family_of(address: str) -> str:
    """`IPv4` or `IPv6`."""
    return "IPv4" if ip_address(address).version == 4 else "IPv6"


def assign(
    spec: Mapping[str, Any], old: Mapping[str, Any], ranges: Ranges, used: Iterable[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """The service's spec with families and addresses. `old` is the spec before (empty for a new one), `used` are the
    addresses of the other services."""
    taken = set(used)
    result = dict(spec)
    for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
        if key not in result and key in old:
            result[key] = old[key]
    problems: list[Problem] = []
    asked: list[str] = list(result.get("clusterIPs") or ([result["clusterIP"]] if result.get("clusterIP") else []))
    if result.get("clusterIP") and asked[:1] != [result["clusterIP"]]:
        problems.append(Problem("spec.clusterIPs", "FieldValueInvalid", "the first must be spec.clusterIP"))
        return result, problems
    headless = asked[:1] == ["None"]
    asked = [] if headless else asked
    families: list[str] = list(result.get("ipFamilies") or [family_of(address) for address in asked])
    dual = len(families) > 1 or len(asked) > 1
    policy = result.get("ipFamilyPolicy") or ("RequireDualStack" if dual else "SingleStack")
    if policy == "SingleStack":
        if dual and families == old.get("ipFamilies"):
            families, asked = families[:1], asked[:1]  # the second family is given up
        elif dual:
            problems.append(
                Problem("spec.ipFamilyPolicy", "FieldValueInvalid", "SingleStack, but two families are asked for")
            )
        families = families[:1] or ["IPv4"]
    else:
        families = families[:1] or ["IPv4"]
        families.append("IPv6" if families[0] == "IPv4" else "IPv4")
    result["ipFamilies"], result["ipFamilyPolicy"] = families, policy
    if headless:
        result["clusterIP"], result["clusterIPs"] = "None", ["None"]
        return result, problems
    chosen: list[str] = []
    for index, family in enumerate(families):
        network = ranges.of(family)
        if index < len(asked):
            address = ip_address(asked[index])
            if address not in network:
                why = f"{address} is not in the lab's range of service addresses, {network}"
                problems.append(Problem(f"spec.clusterIPs[{index}]", "FieldValueInvalid", why))
            elif str(address) in taken:
                problems.append(
                    Problem(f"spec.clusterIPs[{index}]", "FieldValueInvalid", f"{address} is already allocated")
                )
            chosen.append(str(address))
            continue
        free = next(
            (
                str(network[n])
                for n in range(FIRST, min(network.num_addresses - 1, 4096))
                if str(network[n]) not in taken
            ),
            "",
        )
        if not free:
            problems.append(Problem("spec.clusterIPs", "FieldValueInvalid", f"no address is left in {network}"))
        chosen.append(free)
    result["clusterIPs"], result["clusterIP"] = chosen, chosen[0]
    if old.get("clusterIP") and old["clusterIP"] != result["clusterIP"]:
        problems.append(Problem("spec.clusterIP", "FieldValueInvalid", "cannot be changed: delete the service first"))
    return result, problems
