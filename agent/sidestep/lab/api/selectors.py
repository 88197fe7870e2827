"""Label and field selectors, in the text forms of Kubernetes.

A selector is a predicate over objects. A text that cannot be understood raises `ApiError` 400.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.resources import Kind

Predicate = Callable[[Mapping[str, Any]], bool]

_KEY = r"(?:[a-z0-9A-Z][-a-z0-9A-Z.]*/)?[a-zA-Z0-9](?:[-_.a-zA-Z0-9]*[a-zA-Z0-9])?"
_VALUE = r"(?:[a-zA-Z0-9](?:[-_.a-zA-Z0-9]*[a-zA-Z0-9])?)?"
_EQUALS = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})")
_IN = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_HAS = re.compile(rf"(!?)\s*({_KEY})")


def everything(_: Mapping[str, Any]) -> bool:
    """The empty selector."""
    return True


def labels(text: str) -> Predicate:
    """`a=b,c!=d,e in (f,g),!h` over metadata.labels."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    if not parts:
        return everything
    tests = [_requirement(part) for part in parts]

    def match(obj: Mapping[str, Any]) -> bool:
        found = obj["metadata"].get("labels") or {}
        return all(test(found) for test in tests)

    return match


def _requirement(part: str) -> Callable[[Mapping[str, str]], bool]:
    if found := _EQUALS.fullmatch(part):
        key, operator, value = found.groups()
        if operator == "!=":
            return lambda have: have.get(key) != value
        return lambda have: have.get(key) == value
    if found := _IN.fullmatch(part):
        key, operator = found[1], found[2]
        values = {value.strip() for value in found[3].split(",")}
        if operator == "notin":
            return lambda have: have.get(key) not in values
        return lambda have: have.get(key) in values
    if found := _HAS.fullmatch(part):
        absent, key = found[1] == "!", found[2]
        return lambda have: (key in have) is not absent
    raise ApiError(400, f"labelSelector: cannot understand {part!r}")


def fields(kind: Kind, text: str) -> Predicate:
    """`spec.nodeName=node1,status.phase!=Failed`; only the paths that the kind declares."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        return everything
    tests: list[Predicate] = []
    for part in parts:
        found = re.fullmatch(r"([A-Za-z.]+)\s*(==|=|!=)\s*(.*)", part)
        if found is None:
            raise ApiError(400, f"fieldSelector: cannot understand {part!r}")
        path, operator, value = found.groups()
        if path not in ("metadata.name", "metadata.namespace", *kind.selectable):
            raise ApiError(400, f"field label not supported: {path} (of {kind.resource})")
        tests.append(_field(tuple(path.split(".")), value, operator != "!="))
    return lambda obj: all(test(obj) for test in tests)


def _field(path: tuple[str, ...], value: str, equal: bool) -> Predicate:
    def match(obj: Mapping[str, Any]) -> bool:
        here: Any = obj
        for step in path:
            here = here.get(step) if isinstance(here, Mapping) else None
        text = "" if here is None else str(here).lower() if isinstance(here, bool) else str(here)
        return (text == value) is equal

    return match


def both(first: Predicate, second: Predicate) -> Predicate:
    """What both select."""
    if first is everything:
        return second
    if second is everything:
        return first
    return lambda obj: first(obj) and second(obj)


def match_labels(wanted: Mapping[str, str], labels_: Mapping[str, str]) -> bool:
    """Are all of `wanted` among the labels?"""
    return all(labels_.get(key) == value for key, value in wanted.items())
