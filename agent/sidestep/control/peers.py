"""PeerAuthentication to records that deny who has no identity, by the rules of reference/istio-ambient.md 5.8. Pure.

A *demand* is what one object asks for: a mode, a selector, modes of ports. STRICT as a whole is the same record for
everybody (`strict`); a demand with modes of ports has a record of its own, which takes the place of that one. For a
workload the demand that selects it decides, else its namespace's, else that of the root namespace; of several of one
kind the oldest, and the others are said to have no effect. UNSET asks the next. DISABLE is PERMISSIVE: what carries an
identity cannot be turned away here.

Upstream has gaps in what it makes of modes of ports beside an UNSET or PERMISSIVE one (a STRICT port that is not denied
where the root is STRICT too, a workload that lists a record that is not there); here a port has its own mode, else its
demand's, else the inherited one.

A demand that cannot be read keeps its last version that could; without one it is STRICT, without exceptions, for all
that it selects; where its selector cannot be read, that is its namespace, whatever other demands say. (In the root
namespace a selector selects nothing, as upstream.)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sidestep.control.objects import Labels, Policy
from sidestep.control.policies import (
    ACCEPTED,
    GLOBAL,
    INVALID,
    NAMESPACE,
    OVERRIDDEN,
    SELECTOR,
    UNSUPPORTED,
    Ruling,
    Unreadable,
    bounded,
    entry_of,
    selector_of,
    shown,
)
from sidestep.wire.delta import Entry
from sidestep.wire.pb import authorization_pb2 as pb

STATIC = "istio_converted_static_strict"
CONVERTED = "converted_peer_authentication_"
STRICT, PERMISSIVE, DISABLE, UNSET = "STRICT", "PERMISSIVE", "DISABLE", "UNSET"
MODES = (STRICT, PERMISSIVE, DISABLE, UNSET)
_LAX = (PERMISSIVE, DISABLE)
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one PeerAuthentication asks for. `ports`: mode by number, those only that may say something; `blind`: its
    selector cannot be read. `not_enforced` and `reason` are as in a Ruling.
    """

    namespace: str
    name: str
    created: str
    mode: str
    selector: Labels | None
    ports: tuple[tuple[int, str], ...]
    scope: str
    blind: bool = False
    reason: str = ACCEPTED
    not_enforced: tuple[str, ...] = ()

    @property
    def age(self) -> tuple[str, str]:
        """The oldest is the least."""
        return self.created, self.name

    @property
    def record_name(self) -> str:
        """The name of its own record."""
        return f"{self.namespace}/{CONVERTED}{self.name}"

    def ruling(self, entry: Entry | None, others: Iterable["Demand"]) -> Ruling:
        """What is said about it. `others`: those of its namespace; an older one may leave it without effect."""
        first = min((each for each in others if each.hides(self)), key=lambda each: each.age, default=None)
        if first is not None:
            line = f"NOT ENFORCED: {first.namespace}/{first.name} is older, and selects the same"
            return replace(self, reason=self._worse(), not_enforced=(line, *self.not_enforced))._said(entry)
        return self._said(entry)

    def hides(self, other: "Demand") -> bool:
        """Whether it decides for all workloads that another selects."""
        if self.blind or other.blind or self.age >= other.age:
            return False
        if self.selector and other.selector:
            return self.selector <= other.selector
        return not self.selector and not other.selector

    def _worse(self) -> str:
        return INVALID if self.reason == INVALID else OVERRIDDEN

    def _said(self, entry: Entry | None) -> Ruling:
        accepted = self.reason == ACCEPTED
        message = "accepted" if accepted else bounded(self.not_enforced)
        return Ruling(
            entry, self.selector, self.mode, self.scope, False, accepted, self.reason, message, self.not_enforced
        )


def demand(policy: Policy, root: str, last: Demand | None) -> Demand:
    """From an object. `last`: of the newest version of the same object that could be read."""
    faults: list[str] = []
    spec = policy.spec if policy.spec is not None else {}
    if not isinstance(spec, Mapping):
        faults.append(f"spec: must be an object, is {shown(spec)}")
        spec = {}
    for key in sorted(map(str, spec.keys() - {"selector", "mtls", "portLevelMtls"})):
        faults.append(f"spec.{key}: nobody knows this field")
    selector, blind = None, False
    try:
        selector = selector_of(spec)
    except Unreadable as error:
        faults.append(str(error))
        blind = True
    notes: list[str] = []
    mode = _mode(spec.get("mtls"), "spec.mtls", faults)
    if mode == DISABLE:
        notes.append("spec.mtls.mode: NOT ENFORCED as written: DISABLE acts as PERMISSIVE")
    ports = _ports(spec.get("portLevelMtls"), mode, faults, notes)
    scope = GLOBAL if policy.namespace == root else NAMESPACE
    if selector or (blind and policy.namespace == root):
        scope = SELECTOR
    if selector and policy.namespace == root:
        notes.append("spec.selector: NOT ENFORCED: in the root namespace nothing can be selected")
    elif ports and not selector:
        notes.append("spec.portLevelMtls: NOT ENFORCED: ports need a selector")
        ports = ()
    if not faults:
        reason = UNSUPPORTED if notes else ACCEPTED
        return Demand(
            policy.namespace, policy.name, policy.created, mode, selector, ports, scope, False, reason, tuple(notes)
        )
    what = "it is STRICT" if not blind or policy.namespace != root else "it selects nothing"
    if last is not None:
        what = "the last version that could be read stays in force"
    lines = tuple([f"NOT ENFORCED, {what}: {fault}" for fault in faults] + notes)
    if last is not None:
        lines += tuple(line for line in last.not_enforced if line not in lines)
        return replace(last, reason=INVALID, not_enforced=lines)
    return Demand(policy.namespace, policy.name, policy.created, STRICT, selector, (), scope, blind, INVALID, lines)


def _mode(mtls: Any, path: str, faults: list[str]) -> str:
    if mtls is None:
        return UNSET
    if not isinstance(mtls, Mapping):
        faults.append(f"{path}: must be an object, is {shown(mtls)}")
        return UNSET
    for key in sorted(map(str, mtls.keys() - {"mode"})):
        faults.append(f"{path}.{key}: nobody knows this field")
    mode = mtls.get("mode")
    if mode is None:
        return UNSET
    if not isinstance(mode, str) or mode not in MODES:
        faults.append(f"{path}.mode: {shown(mode)} is none of {', '.join(MODES)}")
        return UNSET
    return mode


def _ports(found: Any, base: str, faults: list[str], notes: list[str]) -> tuple[tuple[int, str], ...]:
    if found is None:
        return ()
    path = "spec.portLevelMtls"
    if not isinstance(found, Mapping):
        faults.append(f"{path}: must be an object, is {shown(found)}")
        return ()
    modes: dict[int, str] = {}
    for key, value in found.items():
        text = str(key)
        if not _PORT.fullmatch(text) or int(text) > 65535:
            faults.append(f"{path}.{text[:80]}: is no port")
            continue
        mode = _mode(value, f"{path}.{text}", faults)
        if mode == DISABLE:
            notes.append(f"{path}.{text}.mode: NOT ENFORCED as written: DISABLE acts as PERMISSIVE")
        if mode != UNSET:
            modes[int(text)] = mode
    if base == UNSET and DISABLE in modes.values() and PERMISSIVE not in modes.values():
        # As upstream, which looks for the word PERMISSIVE only; this errs on the safe side.
        notes.append(f"{path}: NOT ENFORCED: DISABLE makes no exception from an inherited STRICT")
    return tuple(sorted(modes.items()))


def inherited(demands: Iterable[Demand], namespace: str, root: str) -> str:
    """The mode of workloads of a namespace that no demand selects: STRICT or PERMISSIVE. `demands`: all of that
    namespace and of the root namespace.
    """
    wide = sorted((each for each in demands if not each.selector and not each.blind), key=lambda each: each.age)
    for space in (namespace, root):
        first = next((each for each in wide if each.namespace == space), None)
        if first is not None and first.mode != UNSET:
            return STRICT if first.mode == STRICT else PERMISSIVE
    return PERMISSIVE


def own(each: Demand, root: str, parent: str) -> pb.Authorization | None:
    """The record of a demand with modes of ports, None where the common one says the same or nothing needs saying.
    `parent`: STRICT or PERMISSIVE, what holds in its namespace.
    """
    if each.namespace == root or not each.selector or not each.ports:
        return None
    strict = (parent if each.mode == UNSET else each.mode) == STRICT
    ports = [port for port, mode in each.ports if (mode in _LAX) is strict and mode != UNSET]
    if not ports:
        return None
    record = _denying(each.namespace, CONVERTED + each.name)
    if not strict:
        for port in ports:
            _nameless(record.rules.add().clauses.add().matches.add()).destination_ports.append(port)
        return record
    rule = record.rules.add()
    if each.mode == STRICT:
        _nameless(rule.clauses.add().matches.add())
    for port in ports:
        rule.clauses.add().matches.add().not_destination_ports.append(port)
    if each.mode == UNSET:
        _nameless(rule.clauses.add().matches.add())
    return record


def named(demands: Iterable[Demand], namespace: str, labels: Labels, root: str, parent: str) -> tuple[str, ...]:
    """The names of the records that a workload with these labels lists: none, or one. `demands`: those of its
    namespace; `parent` as in `own`.
    """
    static = (f"{root}/{STATIC}",)
    if namespace != root:
        if any(each.blind for each in demands):
            return static
        found = (each for each in demands if each.selector and each.selector <= labels)
        first = min(found, key=lambda each: each.age, default=None)
        if first is not None:
            words = {word for _, word in first.ports}
            if (parent if first.mode == UNSET else first.mode) != STRICT:
                return (first.record_name,) if STRICT in words else ()
            excepted = PERMISSIVE in words or (DISABLE in words and first.mode == STRICT)
            return (first.record_name,) if excepted else static
    return static if parent == STRICT else ()


def strict(root: str) -> Entry:
    """The record that all share: whoever has no identity is denied."""
    record = _denying(root, STATIC)
    _nameless(record.rules.add().clauses.add().matches.add())
    return entry_of(record)


def _denying(namespace: str, name: str) -> pb.Authorization:
    return pb.Authorization(namespace=namespace, name=name, scope=pb.WORKLOAD_SELECTOR, action=pb.DENY)


def _nameless(match: pb.Match) -> pb.Match:
    match.not_principals.add(presence=pb.Presence())
    return match
