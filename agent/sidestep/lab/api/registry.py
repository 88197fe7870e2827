"""What may be written, and what a write entails: the rules of Kubernetes that hold whoever writes.

The HTTP server and the lab's controllers both write through a `Registry`. It adds defaults, checks the shape, keeps
the fields that the server owns, gives Services their addresses and namespaces their default account, and knows how
objects go: with finalizers, with a pod's grace period, with a namespace's content.
"""

import copy
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sidestep.lab.api import addresses, defaults, errors, fields, patches
from sidestep.lab.api.errors import ApiError, Problem
from sidestep.lab.api.resources import (
    BY_PATH,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    KINDS,
    NAMESPACE,
    NODE,
    POD,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
)
from sidestep.lab.api.store import Object, Store, Stored

LETTERS = "bcdfghjklmnpqrstvwxz2456789"
EVENTS = 1000  # objects of kind Event that are kept, the newest
KEPT_NAMESPACES = frozenset({"default", "kube-system"})
_SERVER_OWNED = (
    "name",
    "namespace",
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "generateName",
)


@dataclass(frozen=True, slots=True)
class Deletion:
    """Options of a deletion. `grace_s` None: the object's own; `propagation`: Background, Foreground or Orphan."""

    grace_s: int | None = None
    uid: str = ""
    revision: str = ""
    propagation: str = "Background"
    dry_run: bool = False


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, whole seconds, as Kubernetes writes it."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def suffix(length: int = 5) -> str:
    """Random letters for names."""
    return "".join(secrets.choice(LETTERS) for _ in range(length))


class Registry:
    """All writes. Raises `ApiError`; a write that raises has changed nothing."""

    def __init__(
        self, store: Store, ranges: addresses.Ranges, ca_pem: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.clock = clock
        self._ranges = ranges
        self._ca_pem = ca_pem
        self._applied: dict[tuple[str, str], Object] = {}  # (uid, field manager) -> what it applied last

    # -- create ----------------------------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False) -> Stored:
        """Keeps a new object."""
        obj = self._received(kind, namespace, body)
        metadata = obj["metadata"]
        if not metadata.get("name"):
            prefix = metadata.get("generateName")
            if not isinstance(prefix, str) or not prefix:
                raise errors.invalid(
                    kind.kind,
                    kind.group,
                    "",
                    [Problem("metadata.name", "FieldValueRequired", "name or generateName must be given")],
                )
            metadata["name"] = prefix[:58] + suffix()
        for field in ("deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion"):
            metadata.pop(field, None)
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = timestamp(self.clock())
        if kind.has_generation:
            metadata["generation"] = 1
        if kind.has_status and kind is not NODE:
            obj.pop("status", None)
        if kind is POD:
            obj["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
        elif kind is SERVICE:
            obj["status"] = {"loadBalancer": {}}
        obj = self._checked(kind, obj)
        name = str(metadata["name"])
        if kind.namespaced:
            self._admit(kind, namespace, obj)
        if self.store.get(kind, namespace, name) is not None:
            raise errors.exists(kind.plural, kind.group, name)
        if kind is SERVICE:
            self._assign(obj, {})
        if dry_run:
            return Stored(kind, obj, 0)
        stored = self.store.create(kind, obj)
        if kind is NAMESPACE:
            self._furnish(name)
        elif kind is EVENT:
            self._forget_events()
        return stored

    def _forget_events(self) -> None:
        """Whoever reports again and again must not fill the memory: the oldest go."""
        kept = self.store.list(EVENT)
        if len(kept) > EVENTS:
            for stored in sorted(kept, key=lambda stored: stored.revision)[: len(kept) - EVENTS]:
                self.store.remove(EVENT, stored.namespace, stored.name)

    def _received(self, kind: Kind, namespace: str, body: Mapping[str, Any]) -> Object:
        """The body as an object of the kind the path names."""
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be an object")
        obj: Object = defaults.without_nulls(body)
        if obj.get("apiVersion") in kind.api_versions:
            obj["apiVersion"] = kind.api_version
        for field, wanted in (("kind", kind.kind), ("apiVersion", kind.api_version)):
            if obj.get(field, wanted) != wanted:
                raise ApiError(400, f"{field} is {obj[field]!r}, but the path takes {wanted!r}")
            obj[field] = wanted
        metadata = obj.setdefault("metadata", {})
        if not isinstance(metadata, dict):
            raise ApiError(400, "metadata must be an object")
        for field in ("managedFields", "selfLink"):
            metadata.pop(field, None)
        if kind.namespaced:
            if metadata.get("namespace", namespace) != namespace:
                raise ApiError(400, f"metadata.namespace is {metadata['namespace']!r}, but the path says {namespace!r}")
            metadata["namespace"] = namespace
        else:
            metadata.pop("namespace", None)
        return obj

    def _checked(self, kind: Kind, obj: Object) -> Object:
        """With defaults, and good."""
        obj = defaults.fill(kind, obj)
        problems = fields.problems_of(kind, obj)
        if problems:
            raise errors.invalid(kind.kind, kind.group, str(obj["metadata"].get("name", "")), problems)
        if kind in (SECRET, CONFIG_MAP):
            defaults.check_base64(kind, obj)
        return obj

    def _admit(self, kind: Kind, namespace: str, obj: Object) -> None:
        """What other objects must be there for a new one."""
        home = self.store.need(NAMESPACE, "", namespace)
        if "deletionTimestamp" in home.obj["metadata"]:
            why = f'{kind.resource} "{obj["metadata"]["name"]}" is forbidden: namespace {namespace} is being terminated'
            raise ApiError(403, why)
        if kind is POD:
            account = obj["spec"]["serviceAccountName"]
            if self.store.get(SERVICE_ACCOUNT, namespace, account) is None:
                why = (
                    f'pods "{obj["metadata"]["name"]}" is forbidden: there is no service account {namespace}/{account}'
                )
                raise ApiError(403, why)

    def _assign(self, obj: Object, old: Mapping[str, Any]) -> None:
        """Gives a service its cluster addresses."""
        metadata = obj["metadata"]
        key = (metadata["namespace"], metadata["name"])
        used = [
            address
            for service in self.store.list(SERVICE)
            if (service.namespace, service.name) != key
            for address in service.obj["spec"].get("clusterIPs", ())
        ]
        spec, problems = addresses.assign(obj["spec"], old, self._ranges, used)
        if problems:
            raise errors.invalid("Service", "", metadata["name"], problems)
        obj["spec"] = spec

    def _furnish(self, namespace: str) -> None:
        """The default account and the API's root of a new namespace."""
        self.create(SERVICE_ACCOUNT, namespace, {"metadata": {"name": "default"}})
        if self._ca_pem:
            self.create(
                CONFIG_MAP, namespace, {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self._ca_pem}}
            )

    # -- change ----------------------------------------------------------------------------------------------------

    def update(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: Mapping[str, Any],
        *,
        status: bool = False,
        dry_run: bool = False,
    ) -> Stored:
        """Replaces an object, or (`status`) its status and what a status writer may change of its metadata."""
        old = self.store.need(kind, namespace, name)
        new = self._received(kind, namespace, body)
        metadata = new["metadata"]
        if metadata.get("name", name) != name:
            raise ApiError(400, f"metadata.name is {metadata['name']!r}, but the path says {name!r}")
        before = old.obj["metadata"]
        if metadata.get("uid", before["uid"]) != before["uid"]:
            why = f"the UID in the precondition ({metadata['uid']}) is not the object's ({before['uid']})"
            raise errors.conflict(kind.plural, kind.group, name, why)
        version = metadata.pop("resourceVersion", "")
        if version not in ("", "0", before["resourceVersion"]):
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise errors.conflict(kind.plural, kind.group, name, why)
        for field in _SERVER_OWNED:
            metadata.pop(field, None)
            if field in before:
                metadata[field] = before[field]
        if status:
            new = {**old.obj, "metadata": metadata, "status": new.get("status", {})}
            metadata["ownerReferences"] = before.get("ownerReferences", [])
            if not metadata["ownerReferences"]:
                del metadata["ownerReferences"]
        elif kind.has_status:
            new.pop("status", None)
            if "status" in old.obj:
                new["status"] = old.obj["status"]
        if kind is POD and not status and isinstance(new.get("spec"), dict):
            for field in ("nodeName", "serviceAccountName"):
                if field in old.obj["spec"]:
                    new["spec"].setdefault(field, old.obj["spec"][field])
        new = self._checked(kind, new)
        if kind is POD and not status:
            self._same_spec(old.obj, new)
        if kind is DEPLOYMENT and new["spec"]["selector"] != old.obj["spec"]["selector"]:
            problem = Problem("spec.selector", "FieldValueInvalid", "cannot be changed: delete the deployment first")
            raise errors.invalid(kind.kind, kind.group, name, [problem])
        if kind is SERVICE and not status:
            self._assign(new, old.obj["spec"])
        return self._keep(old, new, dry_run)

    def _keep(self, old: Stored, new: Object, dry_run: bool = False) -> Stored:
        kind = old.kind
        metadata = new["metadata"]
        metadata["resourceVersion"] = old.obj["metadata"]["resourceVersion"]
        if kind.has_generation and new.get("spec") != old.obj.get("spec"):
            metadata["generation"] = old.obj["metadata"].get("generation", 1) + 1
        if new == old.obj:
            return old
        if dry_run:
            return Stored(kind, new, old.revision)
        stored = self.store.replace(kind, new)
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            return self._finish(stored)
        return stored

    def _same_spec(self, old: Object, new: Object) -> None:
        if new["spec"] != old["spec"]:
            changed = sorted(
                key for key in {**new["spec"], **old["spec"]} if new["spec"].get(key) != old["spec"].get(key)
            )
            why = "a pod's spec cannot be changed: delete the pod and create it again"
            problems = [Problem(f"spec.{key}", "FieldValueForbidden", why) for key in changed]
            raise errors.invalid("Pod", "", old["metadata"]["name"], problems)

    def modify(self, stored: Stored, change: Callable[[Object], None]) -> Stored:
        """For the controllers: changes a copy of the object, without the rules for clients."""
        new = copy.deepcopy(stored.obj)
        change(new)
        return self._keep(stored, new)

    def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        patch: Any,
        form: str,
        *,
        status: bool = False,
        dry_run: bool = False,
        manager: str = "",
    ) -> tuple[Stored, bool]:
        """Patches an object; `form` is merge, strategic, json or apply. Gives the object and whether it is new, which
        only apply can make."""
        old = self.store.get(kind, namespace, name)
        if old is None and form != "apply":
            raise errors.not_found(kind.plural, kind.group, name)
        if form == "apply":
            wanted = self._received(kind, namespace, patch)
            if wanted["metadata"].setdefault("name", name) != name:
                raise ApiError(400, f"metadata.name is {wanted['metadata']['name']!r}, but the path says {name!r}")
            created = old is None
            if old is None:
                stored = self.create(kind, namespace, wanted, dry_run=dry_run)
            else:
                before = self._applied.get((old.obj["metadata"]["uid"], manager), {})
                merged = _patched(lambda: patches.apply(old.obj, wanted, before))
                stored = self.update(kind, namespace, name, merged, status=status, dry_run=dry_run)
            if not dry_run and not status:
                self._applied[(stored.obj["metadata"]["uid"], manager)] = wanted
            return stored, created
        assert old is not None
        forms: dict[str, Callable[[Any, Any], Any]] = {
            "merge": patches.merge,
            "strategic": patches.strategic,
            "json": patches.json_patch,
        }
        merged = _patched(lambda: forms[form](old.obj, patch))
        if not isinstance(merged, dict) or not isinstance(merged.get("metadata"), dict):
            raise ApiError(422, "the patch leaves no object")
        if not (isinstance(patch, dict) and "resourceVersion" in (patch.get("metadata") or {})) and form != "json":
            merged["metadata"] = {**merged["metadata"], "resourceVersion": ""}
        return self.update(kind, namespace, name, merged, status=status, dry_run=dry_run), False

    # -- delete ----------------------------------------------------------------------------------------------------

    def delete(self, kind: Kind, namespace: str, name: str, options: Deletion = Deletion()) -> Stored:
        """Deletes, or begins to: a pod on a node goes when the node confirms with grace 0, an object with finalizers
        when the last is taken off, a namespace when it is empty. The answer is the object as it is now or was last."""
        old = self.store.need(kind, namespace, name)
        metadata = old.obj["metadata"]
        for wanted, found in ((options.uid, metadata["uid"]), (options.revision, metadata["resourceVersion"])):
            if wanted and wanted != found:
                raise errors.conflict(
                    kind.plural, kind.group, name, f"the precondition ({wanted}) does not hold ({found})"
                )
        if kind is NAMESPACE and name in KEPT_NAMESPACES:
            raise ApiError(403, f'namespaces "{name}" is forbidden: the lab needs it')
        if options.dry_run:
            return old
        grace = 0
        if kind is POD:
            grace = self._grace(old, options)
        if kind is POD and grace > 0:
            if metadata.get("deletionGracePeriodSeconds", grace + 1) <= grace:
                return old  # it is going already, and sooner
            return self._mark(old, grace)
        if kind is NAMESPACE:
            marked = self._mark(old, None, phase="Terminating")
            self.sweep(name)
            return marked
        if options.propagation == "Orphan":
            self._orphan(str(metadata["uid"]))
        if metadata.get("finalizers"):
            return self._mark(old, 0 if kind is POD else None)
        return self._finish(old, confirmed=True)

    def _grace(self, pod: Stored, options: Deletion) -> int:
        spec, status = pod.obj["spec"], pod.obj.get("status", {})
        grace = int(spec.get("terminationGracePeriodSeconds", 30)) if options.grace_s is None else options.grace_s
        if "nodeName" not in spec or status.get("phase") in ("Succeeded", "Failed"):
            return 0
        return grace

    def _mark(self, old: Stored, grace: int | None, phase: str = "") -> Stored:
        new = copy.deepcopy(old.obj)
        metadata = new["metadata"]
        metadata["deletionTimestamp"] = timestamp(self.clock() + (grace or 0))
        if grace is not None:
            metadata["deletionGracePeriodSeconds"] = grace
        if phase:
            new["status"] = {**new.get("status", {}), "phase": phase}
        if "deletionTimestamp" in old.obj["metadata"] and grace is None:
            return old
        return self.store.replace(old.kind, new)

    def _finish(self, stored: Stored, confirmed: bool = False) -> Stored:
        """Removes an object on which nothing waits any more; gives back what it was last. `confirmed`: its node says
        that it has ended."""
        kind, metadata = stored.kind, stored.obj["metadata"]
        if kind is POD and not confirmed and int(metadata.get("deletionGracePeriodSeconds", 0)) > 0:
            return stored  # the node has not confirmed yet
        if kind is NAMESPACE:
            return stored  # sweep() does it
        last = self.store.remove(kind, stored.namespace, stored.name)
        for key in [key for key in self._applied if key[0] == metadata["uid"]]:
            del self._applied[key]
        return last

    def _orphan(self, uid: str) -> None:
        for kind in KINDS:
            for stored in self.store.list(kind):
                owners = stored.obj["metadata"].get("ownerReferences", [])
                rest = [owner for owner in owners if owner["uid"] != uid]
                if len(rest) != len(owners):

                    def drop(obj: Object, rest: list[Object] = rest) -> None:
                        obj["metadata"]["ownerReferences"] = rest

                    self.modify(stored, drop)

    def sweep(self, namespace: str) -> None:
        """Deletes what is in a namespace that is going; the namespace too once it is empty."""
        home = self.store.get(NAMESPACE, "", namespace)
        if home is None or "deletionTimestamp" not in home.obj["metadata"]:
            return
        left = 0
        for kind in KINDS:
            if not kind.namespaced:
                continue
            for stored in self.store.list(kind, namespace):
                if "deletionTimestamp" not in stored.obj["metadata"]:
                    self.delete(kind, namespace, stored.name)
                left += self.store.get(kind, namespace, stored.name) is not None
        if not left and not home.obj["metadata"].get("finalizers"):
            self.store.remove(NAMESPACE, "", namespace)

    def terminating(self, namespace: str) -> bool:
        """Is a namespace going, or gone?"""
        home = self.store.get(NAMESPACE, "", namespace)
        return home is None or "deletionTimestamp" in home.obj["metadata"]

    # -- the parts of a scale --------------------------------------------------------------------------------------

    def scale(self, namespace: str, name: str, replicas: Any) -> Stored:
        """Sets a deployment's replicas."""
        old = self.store.need(DEPLOYMENT, namespace, name)
        spec = {**old.obj["spec"], "replicas": replicas}
        return self.update(DEPLOYMENT, namespace, name, {**old.obj, "spec": spec})


def _patched(make: Callable[[], Any]) -> Any:
    """What a patch makes; 422 where its parts have shapes that no patch has."""
    try:
        return make()
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ApiError(422, f"the patch cannot be applied: {error!r}") from None


def kind_of(group: str, version: str, plural: str) -> Kind | None:
    """The kind that a path names."""
    return BY_PATH.get((group, version, plural))


def selected_pods(store: Store, namespace: str, selector: Mapping[str, str]) -> list[Stored]:
    """Pods of a namespace that have all these labels."""
    found = []
    for pod in store.list(POD, namespace):
        labels = pod.obj["metadata"].get("labels", {})
        if all(labels.get(key) == value for key, value in selector.items()):
            found.append(pod)
    return found
