"""The patches of Kubernetes, as pure functions: new object from old object and patch.

- JSON merge patch (RFC 7396);
- JSON patch (RFC 6902);
- strategic merge: like a merge patch, but lists of objects are merged by a key that the field has in the types of
  Kubernetes (`KEYS`), with the directives `$patch`, `$retainKeys`, `$setElementOrder/...` and
  `$deleteFromPrimitiveList/...`;
- apply: what one field manager wants, merged strategically; what it wanted last time and no longer wants goes.

None changes its arguments. A patch that cannot be applied raises `ApiError` 400 or 422.
"""

import copy
from typing import Any

from sidestep.lab.api.errors import ApiError

# Merge keys by the name of the list. `ports` differs by where it is: a Service's have no containerPort.
KEYS: dict[str, tuple[str, ...]] = {
    "addresses": ("type",),
    "conditions": ("type",),
    "containers": ("name",),
    "containerStatuses": (),
    "env": ("name",),
    "hostIPs": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "podIPs": ("ip",),
    "ports": ("containerPort", "port"),
    "secrets": ("name",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
SETS = frozenset({"finalizers"})  # lists of primitives that are merged
MAX_OPERATIONS = 1000


def merge(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def strategic(old: Any, patch: Any) -> Any:
    """A strategic merge patch on an object."""
    if not isinstance(patch, dict):
        raise ApiError(400, "a strategic merge patch must be an object")
    return _map(old if isinstance(old, dict) else {}, patch, "")


def _map(old: dict[str, Any], patch: dict[str, Any], path: str) -> dict[str, Any]:
    directive = patch.get("$patch")
    if directive == "replace":
        return {key: _clean(value) for key, value in patch.items() if not key.startswith("$")}
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise ApiError(400, f"{path or 'patch'}: unknown $patch directive {directive!r}")
    result = dict(old)
    if "$retainKeys" in patch:
        keep = set(patch["$retainKeys"])
        result = {key: value for key, value in result.items() if key in keep}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [item for item in result.get(name) or [] if item not in value]
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        here = f"{path}.{key}" if path else key
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            before = result.get(key)
            result[key] = _map(before if isinstance(before, dict) else {}, value, here)
        elif isinstance(value, list):
            result[key] = _list(result.get(key), value, key, here)
        else:
            result[key] = value
    for key, value in patch.items():
        if key.startswith("$setElementOrder/"):
            name = key.partition("/")[2]
            if isinstance(result.get(name), list):
                result[name] = _ordered(result[name], value, name)
    return result


def _merge_key(name: str, items: list[Any]) -> str | None:
    """The key by which a list is merged, None where it is replaced as a whole."""
    for key in KEYS.get(name, ()):
        if items and all(isinstance(item, dict) and (key in item or item.get("$patch") == "replace") for item in items):
            return key
    return None


def _list(old: Any, patch: list[Any], name: str, path: str) -> list[Any]:
    before: list[Any] = old if isinstance(old, list) else []
    if name in SETS:
        return list(dict.fromkeys([*before, *patch]))
    if any(isinstance(item, dict) and item.get("$patch") == "replace" and len(item) == 1 for item in patch):
        return [_clean(item) for item in patch if not (isinstance(item, dict) and item.get("$patch") == "replace")]
    key = _merge_key(name, patch)
    if key is None:
        if patch and any(isinstance(item, dict) and "$patch" in item for item in patch):
            raise ApiError(400, f"{path}: a $patch directive needs the list's merge key")
        return [_clean(item) for item in patch]
    result = list(before)
    for item in patch:
        if item.get("$patch") == "delete":
            result = [entry for entry in result if not (isinstance(entry, dict) and entry.get(key) == item[key])]
            continue
        for index, entry in enumerate(result):
            if isinstance(entry, dict) and entry.get(key) == item[key] and _same_protocol(name, entry, item):
                result[index] = _map(entry, item, f"{path}[{index}]")
                break
        else:
            result.append(_map({}, item, f"{path}[{len(result)}]"))
    return result


def _same_protocol(name: str, entry: dict[str, Any], item: dict[str, Any]) -> bool:
    """53/TCP and 53/UDP are two ports."""
    return name != "ports" or "protocol" not in item or entry.get("protocol", "TCP") == item["protocol"]


def _ordered(items: list[Any], order: list[Any], name: str) -> list[Any]:
    """Puts what the order names into that order; what it does not name keeps its place behind."""
    key = _merge_key(name, order)
    if key is None:
        wanted = {repr(item): index for index, item in enumerate(order)}
        return sorted(items, key=lambda item: wanted.get(repr(item), len(wanted)))
    rank = {entry[key]: index for index, entry in enumerate(order)}
    return sorted(items, key=lambda item: rank.get(item.get(key), len(rank)) if isinstance(item, dict) else len(rank))


def _clean(value: Any) -> Any:
    """A copy without directives and nulls."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if not key.startswith("$") and item is not None}
    if isinstance(value, list):
        return [_clean(item) for item in value if not (isinstance(item, dict) and item.get("$patch") == "delete")]
    return value


def apply(old: dict[str, Any], wanted: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Server-side apply for one field manager: `wanted` is what it applies now, `before` what it applied last."""
    return _map(_without(old, before, wanted, ""), wanted, "")


def _without(old: Any, before: Any, wanted: Any, name: str) -> Any:
    """`old` without what is in `before` and not in `wanted`."""
    if isinstance(old, dict) and isinstance(before, dict) and isinstance(wanted, dict):
        result = {}
        for key, value in old.items():
            if key in before and key not in wanted:
                continue
            if key in before:
                value = _without(value, before[key], wanted[key], key)
            result[key] = value
        return result
    if isinstance(old, list) and isinstance(before, list) and isinstance(wanted, list):
        key_of = _merge_key(name, before)
        if key_of is not None:
            was = {item[key_of]: item for item in before}
            now = {item.get(key_of): item for item in wanted if isinstance(item, dict)}
            kept: list[Any] = []
            for item in old:
                key = item.get(key_of) if isinstance(item, dict) else None
                if key in was and key not in now:
                    continue
                kept.append(_without(item, was[key], now[key], "") if key in was else item)
            return kept
    return old


def json_patch(old: Any, operations: Any) -> Any:
    """RFC 6902."""
    if not isinstance(operations, list) or not all(isinstance(item, dict) for item in operations):
        raise ApiError(400, "a JSON patch must be a list of operations")
    if len(operations) > MAX_OPERATIONS:
        raise ApiError(413, f"a JSON patch may have {MAX_OPERATIONS} operations, this has {len(operations)}")
    document = copy.deepcopy(old)
    for number, operation in enumerate(operations):
        try:
            document = _operate(document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ApiError(
                422, f"JSON patch, operation {number} ({operation.get('op')} {operation.get('path')}): {error!r}"
            ) from None
    return document


def _operate(document: Any, operation: dict[str, Any]) -> Any:
    kind, path = operation["op"], _pointer(operation["path"])
    if kind == "test":
        if _at(document, path) != operation["value"]:
            raise ValueError("the value differs")
        return document
    if kind == "remove":
        return _remove(document, path)
    if kind == "add":
        return _add(document, path, copy.deepcopy(operation["value"]))
    if kind == "replace":
        _at(document, path)
        return _add(_remove(document, path), path, copy.deepcopy(operation["value"])) if path else operation["value"]
    if kind in ("move", "copy"):
        source = _pointer(operation["from"])
        value = copy.deepcopy(_at(document, source))
        if kind == "move":
            if path[: len(source)] == source and len(path) > len(source):
                raise ValueError("cannot move a value into itself")
            document = _remove(document, source)
        return _add(document, path, value)
    raise ValueError("unknown operation")


def _pointer(text: str) -> list[str]:
    if text == "":
        return []
    if not text.startswith("/"):
        raise ValueError("a path begins with /")
    return [step.replace("~1", "/").replace("~0", "~") for step in text[1:].split("/")]


def _index(items: list[Any], step: str, end: int) -> int:
    if not step.isdecimal() or int(step) >= end:
        raise IndexError(f"no element {step}")
    return int(step)


def _at(document: Any, path: list[str]) -> Any:
    for step in path:
        document = document[_index(document, step, len(document))] if isinstance(document, list) else document[step]
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        return None
    parent = _at(document, path[:-1])
    if isinstance(parent, list):
        del parent[_index(parent, path[-1], len(parent))]
    else:
        del parent[path[-1]]
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent = _at(document, path[:-1])
    if isinstance(parent, list):
        parent.insert(len(parent) if path[-1] == "-" else _index(parent, path[-1], len(parent) + 1), value)
    elif isinstance(parent, dict):
        parent[path[-1]] = value
    else:
        raise TypeError("the parent is neither an object nor a list")
    return document
