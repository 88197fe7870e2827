"""All policies of the mesh: what was decided about each, whom it selects, and which records are to be sent. Pure.

Pods are kept in *groups*: those of one namespace with the same labels. What a workload lists depends on nothing else,
so it is worked out once for a group, and a changed policy costs a look at the groups of its namespace (of all, for one
of the root namespace), not at pods. A workload never lists a record that is not served.

The last version of an object that could be read is remembered as long as the object is there, and over a restart
where somebody keeps it (remembered.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sidestep.control import peers, policies
from sidestep.control.objects import Labels, Pod, Policy
from sidestep.control.peers import Demand
from sidestep.control.policies import GLOBAL, INVALID, NAMESPACE, Ruling
from sidestep.wire.delta import Entry

Key = tuple[str, str]  # kind, NAMESPACE/NAME


@dataclass(slots=True, eq=False)
class _Group:
    """Pods by key. `names`: what each of them lists; None: not worked out yet."""

    pods: set[str] = field(default_factory=set)
    names: tuple[str, ...] | None = None


class Rulings:
    """Policies by kind and NAMESPACE/NAME. `changed`: those whose object or ruling is another one since somebody last
    emptied it.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self.policies: dict[Key, Policy] = {}
        self.changed: set[Key] = set()
        self._recalled: dict[Key, Policy] = {}
        self._rulings: dict[str, Ruling] = {}
        self._last: dict[str, tuple[Policy, Ruling]] = {}
        self._by_label: dict[tuple[str, tuple[str, str]], dict[str, Labels]] = {}
        self._demands: dict[str, dict[str, Demand]] = {}  # by namespace
        self._last_demands: dict[str, tuple[Policy, Demand]] = {}
        self._own: dict[str, dict[str, Entry]] = {}  # records of demands, by namespace
        self._groups: dict[str, dict[Labels, _Group]] = {}
        self._due_records: set[str] = set()
        self._due_selectors: dict[str, set[Labels]] = {}
        self._due_demands: set[str] = set()  # namespaces; the root namespace means all; for records
        self._due_spaces: set[str] = set()  # the same, for groups
        self._parents: dict[str, str] = {}
        self._strict = peers.strict(root)

    def pod(self, key: str, old: Pod | None, new: Pod | None) -> None:
        """A pod is new, changed, or gone (None)."""
        before = (old.namespace, old.labels) if old is not None and not old.terminal else None
        after = (new.namespace, new.labels) if new is not None and not new.terminal else None
        if before == after:
            return
        if before is not None:
            space = self._groups[before[0]]
            group = space[before[1]]
            group.pods.discard(key)
            if not group.pods:
                del space[before[1]]
                if not space:
                    del self._groups[before[0]]
        if after is not None:
            self._groups.setdefault(after[0], {}).setdefault(after[1], _Group()).pods.add(key)

    def recall(self, kept: Mapping[Key, Policy]) -> None:
        """What stood in before a restart (`kept`); to be told before any policy."""
        self._recalled = dict(kept)

    def kept(self) -> dict[Key, Policy]:
        """The versions that stand in for newer ones which cannot be read."""
        found: dict[Key, Policy] = {}
        for key, (policy, _) in self._last.items():
            if self._rulings[key].reason == INVALID:
                found["AuthorizationPolicy", key] = policy
        for key, (policy, _) in self._last_demands.items():
            if self._demands[policy.namespace][key].reason == INVALID:
                found["PeerAuthentication", key] = policy
        return found

    def authorization_policy(self, key: str, new: Policy | None) -> None:
        """An AuthorizationPolicy is new, changed, or gone (None)."""
        old = self._swap("AuthorizationPolicy", key, new)
        if new is not None and new.means(old):
            return
        before = self._rulings.pop(key, None)
        if new is None or old is None or old.uid != new.uid:
            self._last.pop(key, None)
        after = None
        if new is not None:
            recalled = self._recall(new)
            if recalled is not None:
                before_that = policies.authorization(recalled, self._root, None)
                if before_that.good:
                    self._last[key] = recalled, before_that
            _, last = self._last.get(key, (None, None))
            after = policies.authorization(new, self._root, last)
            self._rulings[key] = after
            if after.good:
                self._last[key] = new, after
            elif after.reason != INVALID:
                self._last.pop(key, None)  # it could be read, and is not to be enforced
        self._due_records.add(key)
        sides = [each.selector if each is not None and each.entry is not None else None for each in (before, after)]
        if sides[0] == sides[1]:
            return
        space = key.partition("/")[0]
        for side, there in zip(sides, (False, True), strict=True):
            if side is None:
                continue
            self._due_selectors.setdefault(space, set()).add(side)
            index = self._by_label.setdefault((space, min(side)), {})
            if there:
                index[key] = side
            elif index.pop(key, None) is not None and not index:
                del self._by_label[space, min(side)]

    def peer_authentication(self, key: str, new: Policy | None) -> None:
        """A PeerAuthentication is new, changed, or gone (None)."""
        old = self._swap("PeerAuthentication", key, new)
        if new is not None and new.means(old):
            return
        if new is None or old is None or old.uid != new.uid:
            self._last_demands.pop(key, None)
        space = key.partition("/")[0]
        demands = self._demands.setdefault(space, {})
        demands.pop(key, None)
        if new is not None:
            recalled = self._recall(new)
            if recalled is not None:
                before_that = peers.demand(recalled, self._root, None)
                if before_that.reason != INVALID:
                    self._last_demands[key] = recalled, before_that
            _, last = self._last_demands.get(key, (None, None))
            demands[key] = peers.demand(new, self._root, last)
            if demands[key].reason != INVALID:
                self._last_demands[key] = new, demands[key]
        self.changed |= {("PeerAuthentication", each) for each in demands}  # one may hide the other
        if not demands:
            del self._demands[space]
        self._due_demands.add(space)
        self._due_spaces.add(space)
        self._parents.clear()

    def _recall(self, new: Policy) -> Policy | None:
        """What stood in for an object before a restart; asked once."""
        found = self._recalled.pop((new.kind, new.key), None)
        return found if found is not None and found.uid == new.uid else None

    def _swap(self, kind: str, key: str, new: Policy | None) -> Policy | None:
        old = self.policies.pop((kind, key), None)
        if new is not None:
            self.policies[kind, key] = new
        self.changed.add((kind, key))
        return old

    def take(self) -> dict[str, Entry | None]:
        """The records of policies that changed since the last call, by name; None: there is none any more."""
        made: dict[str, Entry | None] = {}
        for key in self._due_records:
            ruling = self._rulings.get(key)
            made[key] = ruling.entry if ruling is not None else None
        self._due_records.clear()
        if self._due_demands:
            made |= self._take_demands()
        return made

    def _take_demands(self) -> dict[str, Entry | None]:
        made: dict[str, Entry | None] = {}
        spaces = self._due_demands
        if self._root in spaces:
            spaces = self._demands.keys() | self._own.keys() | {self._root}
        for space in spaces:
            parent = self._parent(space)
            old, new = self._own.pop(space, {}), {}
            for each in self._demands.get(space, {}).values():
                record = peers.own(each, self._root, parent)
                if record is not None:
                    new[each.record_name] = policies.entry_of(record)
            made |= dict.fromkeys(old.keys() - new.keys()) | new
            if new:
                self._own[space] = new
        made[self._strict.name] = self._strict if self._demands else None
        self._due_demands = set()
        return made

    def take_pods(self) -> set[str]:
        """The pods whose lists changed since the last call."""
        due: set[str] = set()
        for space in self._spaces(self._due_spaces):
            for labels, group in self._groups[space].items():
                self._renew(space, labels, group, due)
        for space in self._spaces(self._due_selectors.keys()):
            index: dict[tuple[str, str], list[Labels]] = {}
            for each in {space, self._root}:
                for selector in self._due_selectors.get(each, ()):
                    index.setdefault(min(selector), []).append(selector)
            for labels, group in self._groups[space].items():
                if any(selector <= labels for label in labels for selector in index.get(label, ())):
                    self._renew(space, labels, group, due)
        self._due_spaces = set()
        self._due_selectors = {}
        return due

    def _spaces(self, of: Iterable[str]) -> set[str]:
        """Namespaces with pods that something of these namespaces concerns."""
        spaces = set(of)
        return set(self._groups) if self._root in spaces else spaces & self._groups.keys()

    def _renew(self, space: str, labels: Labels, group: _Group, due: set[str]) -> None:
        if group.names is None:
            return  # nobody has asked yet
        names = self._names(space, labels)
        if names != group.names:
            group.names = names
            due |= group.pods

    def names(self, pod: Pod) -> tuple[str, ...]:
        """The names of the records that a pod's record lists: AuthorizationPolicies sorted, then what comes of
        PeerAuthentications.
        """
        group = self._groups.get(pod.namespace, {}).get(pod.labels)
        if group is None:
            return ()
        if group.names is None:
            group.names = self._names(pod.namespace, pod.labels)
        return group.names

    def _names(self, space: str, labels: Labels) -> tuple[str, ...]:
        found = []
        for each in {space, self._root}:
            for label in labels:
                for key, selector in self._by_label.get((each, label), {}).items():
                    if selector <= labels:
                        found.append(key)
        demands = self._demands.get(space, {}).values()
        return (*sorted(found), *peers.named(demands, space, labels, self._root, self._parent(space)))

    def _parent(self, space: str) -> str:
        """The mode that holds in a namespace."""
        if space not in self._parents:
            demands = [*self._demands.get(space, {}).values(), *self._demands.get(self._root, {}).values()]
            self._parents[space] = peers.inherited(demands, space, self._root)
        return self._parents[space]

    def ruling(self, kind: str, key: str) -> Ruling | None:
        """What was decided about a policy."""
        if kind == "AuthorizationPolicy":
            return self._rulings.get(key)
        space = key.partition("/")[0]
        demands = self._demands.get(space, {})
        demand = demands.get(key)
        if demand is None:
            return None
        return demand.ruling(self._own.get(space, {}).get(demand.record_name), demands.values())

    def report(self) -> list[dict[str, Any]]:
        """All policies, for /status."""
        counts = self._counts()
        found = []
        for (kind, key), policy in sorted(self.policies.items()):
            ruling = self.ruling(kind, key)
            if ruling is None:
                continue
            found.append(
                {
                    "kind": kind,
                    "namespace": policy.namespace,
                    "name": policy.name,
                    "action": ruling.action,
                    "scope": ruling.scope,
                    "dry_run": ruling.dry_run,
                    "accepted": ruling.accepted,
                    "reason": ruling.reason,
                    "message": ruling.message,
                    "not_enforced": list(ruling.not_enforced),
                    "selects": self._selects(kind, policy, ruling, counts),
                    "records": self._records(kind, ruling),
                    "rules": list(ruling.rules),
                }
            )
        return found

    def _records(self, kind: str, ruling: Ruling) -> dict[str, str]:
        """The records that a policy was made into, and their versions: what every engine has to hold. (What an UNSET
        one inherits is the other's.)
        """
        entries = [ruling.entry]
        if kind == "PeerAuthentication" and ruling.action == peers.STRICT:
            entries.append(self._strict)
        return {entry.name: entry.version for entry in entries if entry is not None}

    def tally(self) -> dict[str, int]:
        """How many policies are in force as written, and how many are not."""
        found = {"true": 0, "false": 0}
        for kind, key in self.policies:
            ruling = self.ruling(kind, key)
            if ruling is not None:
                found["true" if ruling.accepted else "false"] += 1
        return found

    def _counts(self) -> dict[str, int]:
        """Workloads by namespace ("NS/"), by the record that they list ("NS/NAME"), and all ("")."""
        counts = {"": 0}
        for space, groups in self._groups.items():
            for group in groups.values():
                size = len(group.pods)
                for name in ("", f"{space}/", *(group.names or ())):
                    counts[name] = counts.get(name, 0) + size
        return counts

    def _selects(self, kind: str, policy: Policy, ruling: Ruling, counts: dict[str, int]) -> int:
        if ruling.scope == GLOBAL:
            return counts[""]
        if ruling.scope == NAMESPACE:
            return counts.get(f"{policy.namespace}/", 0)
        if kind == "AuthorizationPolicy" or ruling.selector is None:
            return counts.get(policy.key, 0)
        groups = self._groups.get(policy.namespace, {}) if policy.namespace != self._root else {}
        return sum(len(group.pods) for labels, group in groups.items() if ruling.selector <= labels)
