"""AuthorizationPolicy to `istio.security.Authorization`, by the rules of reference/istio-ambient.md 5.7. Pure.

A policy becomes a *ruling*: the record that is sent, if any, whom it selects, and what is to be said about it. Two
things may be wrong with a policy, and neither is passed over in silence:

- it asks for what is not enforced at L4 (HTTP fields, conditions on requests, trust domains). As upstream: in ALLOW
  the rule is left out whole, so that what only it would have admitted is denied; in DENY the field is stripped. A
  clause that is left without content is sent as an empty match, which never matches.
- it cannot be read: a port that is none, a field of the wrong type, a word that nobody knows. A rule that cannot be
  read is left out of an ALLOW. Where that would admit what the author wanted denied (any part of a DENY, and what
  concerns a policy as a whole) the last version that could be read stays in force, and without one the policy denies
  all that it selects; where its selector cannot be read, that is its namespace.

Upstream drops the second kind silently and so empties lists, and an empty list asks for nothing.
"""

import hashlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sidestep.control.objects import Labels, Policy
from sidestep.wire.delta import Entry
from sidestep.wire.pb import authorization_pb2 as pb

ACCEPTED, UNSUPPORTED, INVALID, WAYPOINT = "Accepted", "UnsupportedValue", "Invalid", "TargetRefs"
OVERRIDDEN = "Overridden"
GLOBAL, NAMESPACE, SELECTOR = "GLOBAL", "NAMESPACE", "WORKLOAD_SELECTOR"
MESSAGE = 4000  # characters of a condition's message
_SCOPES = {GLOBAL: pb.GLOBAL, NAMESPACE: pb.NAMESPACE, SELECTOR: pb.WORKLOAD_SELECTOR}
_ACTIONS = {"ALLOW": pb.ALLOW, "DENY": pb.DENY}
_ELSEWHERE = ("CUSTOM", "AUDIT")
_WORDS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("", "0", "f", "F", "FALSE", "false", "False"), False
)
_SPEC = frozenset(["selector", "targetRef", "targetRefs", "rules", "action", "provider"])
_PORT = re.compile(r"[0-9]{1,8}", re.ASCII)
_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_ACCOUNT = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ruling:
    """What became of a policy. `entry`: the record, None where none is sent; `selector`: the labels of the workloads
    that name it, None where it is for all of a scope, or for none; `not_enforced`: one line for each rule or field that
    is not, or not as written, in force; `reason` and `message`: of the status condition; `rules`: of each rule of the
    record its number in the policy.
    """

    entry: Entry | None
    selector: Labels | None
    action: str
    scope: str
    dry_run: bool = False
    accepted: bool = True
    reason: str = ACCEPTED
    message: str = "accepted"
    not_enforced: tuple[str, ...] = ()
    rules: tuple[int, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it may stand in for a later version that cannot be read."""
        return self.reason != INVALID and self.entry is not None


class Unreadable(Exception):
    """A value cannot be read; says where and why."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")


def authorization(policy: Policy, root: str, last: Ruling | None) -> Ruling:
    """The ruling on an AuthorizationPolicy. `root`: the root namespace; `last`: that on the newest version of the same
    object that could be read.
    """
    spec = policy.spec if policy.spec is not None else {}
    if not isinstance(spec, Mapping):
        spec, faults = {"action": "DENY"}, [f"spec: must be an object, is {shown(spec)}"]
    else:
        faults = [f"spec.{key}: nobody knows this field" for key in sorted(map(str, spec.keys() - _SPEC))]
    if any(spec.get(key) not in (None, [], {}) for key in ("targetRef", "targetRefs")):
        why = "targetRefs: a waypoint's to enforce, NOT ENFORCED at L4"
        return Ruling(None, None, str(spec.get("action") or "ALLOW"), WAYPOINT, False, False, WAYPOINT, why, (why,))
    action = spec.get("action")
    action = "ALLOW" if action is None else action
    if action in _ELSEWHERE:
        why = f"spec.action: {action} is NOT ENFORCED at L4"
        return Ruling(None, None, str(action), "", False, False, UNSUPPORTED, why, (why,))
    if not isinstance(action, str) or action not in _ACTIONS:
        faults.append(f"spec.action: {shown(action)} is neither ALLOW, DENY, CUSTOM nor AUDIT")
        action = "DENY"
    labels: Labels | None = None
    try:
        labels = selector_of(spec)
    except Unreadable as error:
        faults.append(str(error))
    dry_run = _WORDS.get(policy.dry_run)
    if dry_run is None:
        faults.append(f"metadata.annotations[istio.io/dry-run]: {shown(policy.dry_run)} is neither true nor false")
        dry_run = False
    rules = spec.get("rules")
    if rules is not None and not isinstance(rules, list):
        faults.append(f"spec.rules: must be a list, is {shown(rules)}")
        rules = None
    conversion = _Conversion(policy, root, action, labels, dry_run, faults)
    if spec.get("provider") is not None:
        conversion.notes.append("spec.provider: NOT ENFORCED: goes with CUSTOM only")
    return conversion.ruling(rules or [], last)


class _Conversion:
    """One policy on its way."""

    def __init__(
        self, policy: Policy, root: str, action: str, labels: Labels | None, dry_run: bool, faults: list[str]
    ) -> None:
        self._policy = policy
        self._action = action
        self._labels = labels
        self._dry_run = dry_run
        self._scope = SELECTOR if labels else GLOBAL if policy.namespace == root else NAMESPACE
        self._faults = faults
        self.notes: list[str] = []

    def ruling(self, rules: list[Any], last: Ruling | None) -> Ruling:
        """The ruling, with rules as they came."""
        record = self._record()
        notes, unread, kept = self.notes, [], []
        for index, each in enumerate(rules):
            rule = _Rule(f"spec.rules[{index}]", self._policy.namespace)
            made = rule.read(each)
            if rule.faults:
                unread += rule.faults
                if self._action == "ALLOW":
                    notes.append(f"{rule.path}: NOT ENFORCED, left out: {_listed(rule.faults)}")
                continue
            if rule.unsupported:
                notes.append(f"{rule.path}: {self._unsupported(rule, made)}")
            notes += [f"{rule.path}: NOT ENFORCED: {note}" for note in rule.idle]
            if not (rule.unsupported and self._action == "ALLOW"):
                record.rules.append(made)
                kept.append(index)
        if not rules and self._action == "DENY" and not self._faults:
            notes.append("spec.rules: NOT ENFORCED: DENY without rules denies nothing")
        if self._faults or (unread and self._action == "DENY"):
            return self._stand_in(record, [*self._faults, *unread], notes, last)
        made_of = Ruling(entry_of(record), self._labels, self._action, self._scope, self._dry_run, rules=tuple(kept))
        if not notes:
            return made_of
        reason = INVALID if unread else UNSUPPORTED
        return replace(made_of, accepted=False, reason=reason, message=bounded(notes), not_enforced=tuple(notes))

    def _record(self) -> pb.Authorization:
        return pb.Authorization(
            name=self._policy.name,
            namespace=self._policy.namespace,
            scope=_SCOPES[self._scope],
            action=_ACTIONS[self._action],
            dry_run=self._dry_run,
        )

    def _unsupported(self, rule: "_Rule", made: pb.Rule) -> str:
        fields = _listed(rule.unsupported)
        if self._action == "ALLOW":
            return f"NOT ENFORCED, left out: L4 does not know {fields}"
        if all(any(match.ByteSize() for match in clause.matches) for clause in made.clauses):
            return f"NOT ENFORCED as written, denies more: L4 does not know {fields}"
        return f"NOT ENFORCED, has no effect: L4 does not know {fields}"

    def _stand_in(self, record: pb.Authorization, faults: list[str], notes: list[str], last: Ruling | None) -> Ruling:
        """What is in force instead of a version that cannot be read."""
        if last is not None:
            kept, what = last, "the last version that could be read stays in force"
        elif self._action == "ALLOW":
            # Without its rules where they are not those that were meant; then it admits nobody.
            if self._only_dry_run():
                kept, what = self._made(record), "it is enforced"
            else:
                del record.rules[:]
                kept, what = self._made(record), "it admits nobody"
        else:
            del record.rules[:]
            record.rules.add()
            kept, what = self._made(record), "it denies all that it selects"
        lines = [f"NOT ENFORCED, {what}: {fault}" for fault in faults] + notes
        lines += [line for line in kept.not_enforced if line not in lines]
        return replace(kept, accepted=False, reason=INVALID, message=bounded(lines), not_enforced=tuple(lines))

    def _only_dry_run(self) -> bool:
        return all(fault.startswith("metadata.annotations") for fault in self._faults)

    def _made(self, record: pb.Authorization) -> Ruling:
        return Ruling(entry_of(record), self._labels, self._action, self._scope, self._dry_run)


class _Rule:
    """One rule. `faults`: what cannot be read, `unsupported`: fields that are not of L4, `idle`: values that can never
    match, though they look as if they might; each with its path.
    """

    def __init__(self, path: str, namespace: str) -> None:
        self.path = path
        self.faults: list[str] = []
        self.unsupported: list[str] = []
        self.idle: list[str] = []
        self._namespace = namespace

    def read(self, rule: Any) -> pb.Rule:
        """The rule; not to be used where `faults` is not empty."""
        made = pb.Rule()
        if not isinstance(rule, Mapping):
            self.faults.append(f"{self.path}: must be an object, is {shown(rule)}")
            return made
        self._known(rule, ("from", "to", "when"), self.path)
        for name, inner, fields in (("to", "operation", _OPERATION), ("from", "source", _SOURCE)):
            entries = self._entries(rule, name)
            if not entries:
                continue
            clause = made.clauses.add()
            for index, entry in enumerate(entries):
                path = f"{self.path}.{name}[{index}]"
                if isinstance(entry, Mapping):
                    self._known(entry, (inner,), path)
                    self._fields(entry.get(inner), fields, f"{path}.{inner}", clause.matches.add())
                else:
                    self.faults.append(f"{path}: must be an object, is {shown(entry)}")
        for index, condition in enumerate(self._entries(rule, "when")):
            self._condition(condition, f"{self.path}.when[{index}]", made.clauses.add().matches.add())
        return made

    def _entries(self, rule: Mapping[str, Any], name: str) -> list[Any]:
        entries = rule.get(name)
        if entries is None:
            return []
        if not isinstance(entries, list) or (not entries and name != "when"):
            self.faults.append(f"{self.path}.{name}: must be a list that is not empty, is {shown(entries)}")
            return []
        return entries

    def _known(self, found: Mapping[str, Any], names: Iterable[str], path: str) -> None:
        for name in sorted(map(str, found.keys() - set(names))):
            self.faults.append(f"{path}.{name}: nobody knows this field")

    def _fields(self, found: Any, fields: Mapping[str, "_Field | None"], path: str, match: pb.Match) -> None:
        """The fields of a source or an operation."""
        if not isinstance(found, Mapping):
            self.faults.append(f"{path}: must be an object, is {shown(found)}")
            return
        self._known(found, fields, path)
        some = False
        for name, field in fields.items():
            values = self._values(found.get(name), f"{path}.{name}")
            some = some or bool(values)
            if field is None:
                if values:
                    self.unsupported.append(f"{path.removeprefix(self.path + '.')}.{name}")
                continue
            self._put(field, name.startswith("not"), values, f"{path}.{name}", match)
        if not some:
            self.faults.append(f"{path}: must name something")

    def _condition(self, condition: Any, path: str, match: pb.Match) -> None:
        if not isinstance(condition, Mapping):
            self.faults.append(f"{path}: must be an object, is {shown(condition)}")
            return
        self._known(condition, ("key", "values", "notValues"), path)
        key = condition.get("key")
        if not isinstance(key, str) or not key:
            self.faults.append(f"{path}.key: must be a word, is {shown(key)}")
            return
        lists = {name: self._values(condition.get(name), f"{path}.{name}") for name in ("values", "notValues")}
        if not any(lists.values()):
            self.faults.append(f"{path}: must have values or notValues")
        field = _WHEN.get(key)
        if field is None:
            self.unsupported.append(f"{path.removeprefix(self.path + '.')}.key {key[:200]}")
            return
        for name, values in lists.items():
            self._put(field, name.startswith("not"), values, f"{path}.{name}", match)

    def _values(self, values: Any, path: str) -> list[str]:
        """A list of strings."""
        if values is None:
            return []
        if not isinstance(values, list):
            self.faults.append(f"{path}: must be a list, is {shown(values)}")
            return []
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value:
                self.faults.append(f"{path}[{index}]: must be a word, is {shown(value)}")
        return [value for value in values if isinstance(value, str) and value]

    def _put(self, field: "_Field", negative: bool, values: list[str], path: str, match: pb.Match) -> None:
        target = getattr(match, f"not_{field.name}" if negative else field.name)
        for index, value in enumerate(values):
            try:
                target.append(field.read(value, self._namespace))
            except ValueError as error:
                self.faults.append(f"{path}[{index}]: {shown(value)} {error}")
            if field.name == "principals" and value.startswith("spiffe://"):
                self.idle.append(f"{path}[{index}]: {shown(value)} never matches, principals are without spiffe://")


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a match: its name there, and how a value is read. Raises ValueError."""

    name: str
    read: Callable[[str, str], Any]


def _word(value: str, _namespace: str) -> pb.StringMatch:
    if value == "*":
        return pb.StringMatch(presence=pb.Presence())
    if value.startswith("*"):
        return pb.StringMatch(suffix=value[1:])
    if value.endswith("*"):
        return pb.StringMatch(prefix=value[:-1])
    return pb.StringMatch(exact=value)


def _block(value: str, _namespace: str) -> pb.Address:
    """An address or a block. An IPv4 block in IPv6 dress is an IPv4 block: nobody's address is ever such a one."""
    text, slash, length = value.partition("/")
    try:
        if "%" in text:
            raise ValueError
        address = ipaddress.ip_address(text)
        bits: int = address.max_prefixlen
        if slash:
            if not _LENGTH.fullmatch(length) or int(length) > bits:
                raise ValueError
            bits = int(length)
    except ValueError:
        raise ValueError("is neither an address nor a block") from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None and bits >= 96:
        address, bits = address.ipv4_mapped, bits - 96
    network = ipaddress.ip_network((address, bits), strict=False)
    return pb.Address(address=network.network_address.packed, length=bits)


def _port(value: str, _namespace: str) -> int:
    if not _PORT.fullmatch(value) or not 1 <= int(value) <= 65535:
        raise ValueError("is no port")
    return int(value)


def _account(value: str, namespace: str) -> pb.ServiceAccountMatch:
    space, slash, name = value.rpartition("/")
    if not _ACCOUNT.fullmatch(name) or (slash and not _ACCOUNT.fullmatch(space)):
        raise ValueError("is neither NAMESPACE/ACCOUNT nor ACCOUNT")
    return pb.ServiceAccountMatch(namespace=space or namespace, serviceAccount=name)


_PRINCIPAL = _Field("principals", _word)
_SPACE = _Field("namespaces", _word)
_SERVICE_ACCOUNT = _Field("service_accounts", _account)
_SOURCE_IP = _Field("source_ips", _block)
_DESTINATION_IP = _Field("destination_ips", _block)
_DESTINATION_PORT = _Field("destination_ports", _port)


def _both(**fields: _Field | None) -> dict[str, _Field | None]:
    """Each field, and its not-form."""
    return {name: field for one, field in fields.items() for name in (one, f"not{one[0].upper()}{one[1:]}")}


# None: known, but not of L4.
_SOURCE = _both(
    principals=_PRINCIPAL,
    namespaces=_SPACE,
    serviceAccounts=_SERVICE_ACCOUNT,
    ipBlocks=_SOURCE_IP,
    requestPrincipals=None,
    remoteIpBlocks=None,
    trustDomains=None,
)
_OPERATION = _both(ports=_DESTINATION_PORT, hosts=None, methods=None, paths=None)
_WHEN = {
    "source.ip": _SOURCE_IP,
    "source.namespace": _SPACE,
    "source.principal": _PRINCIPAL,
    "source.serviceAccount": _SERVICE_ACCOUNT,
    "destination.ip": _DESTINATION_IP,
    "destination.port": _DESTINATION_PORT,
}


def selector_of(spec: Mapping[str, Any]) -> Labels | None:
    """The labels that a policy selects by; None where it selects all. Raises Unreadable."""
    selector = spec.get("selector")
    if selector is None:
        return None
    if not isinstance(selector, Mapping):
        raise Unreadable("spec.selector", f"must be an object, is {shown(selector)}")
    for name in sorted(map(str, selector.keys() - {"matchLabels"})):
        raise Unreadable(f"spec.selector.{name}", "nobody knows this field")
    labels = selector.get("matchLabels")
    if labels is None:
        return None
    path = "spec.selector.matchLabels"
    if not isinstance(labels, Mapping):
        raise Unreadable(path, f"must be an object, is {shown(labels)}")
    for key, value in labels.items():
        if not isinstance(value, str) or not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise Unreadable(f"{path}.{key[:200]}", f"{shown(value)} is no label")
    return frozenset(labels.items()) or None


def entry_of(record: pb.Authorization) -> Entry:
    """The record as it is served; its version is of the content."""
    body = record.SerializeToString(deterministic=True)
    version = hashlib.blake2b(body, digest_size=8).hexdigest()
    return Entry(f"{record.namespace}/{record.name}", version, body)


def bounded(lines: Iterable[str]) -> str:
    """Lines as one text that fits into a condition."""
    text = "; ".join(lines)
    return text if len(text) <= MESSAGE else f"{text[: MESSAGE - 3]}..."


def _listed(found: list[str]) -> str:
    shown = ", ".join(found[:8])
    return f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown


def shown(value: Any) -> str:
    """A value in a sentence, bounded."""
    names = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in names and value:
        return names[type(value)]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
