"""A small language for the shape of objects.

A `Check` looks at one value and adds what is wrong with it to a list; checks are put together from other checks. A
field that a `structure` does not name would be ignored, so the object that carries it would behave otherwise than its
author expects: it is refused by name. Fields that change nothing in the lab are named with `kept`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sidestep.lab.api.errors import Problem

Check = Callable[[Any, str, list[Problem]], None]

LONGEST_KEY = 317  # of a label or annotation: 253 for the prefix, a slash, 63 for the name

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DATA_KEY = re.compile(r"(?!\.\.|\.$)[-._a-zA-Z0-9]{1,253}")
PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")


def say(problems: list[Problem], path: str, message: str, reason: str = "FieldValueInvalid") -> None:
    """Adds a problem."""
    problems.append(Problem(path, reason, message))


def kept(value: Any, path: str, problems: list[Problem]) -> None:
    """Kept as it is: it changes nothing in the lab."""


def text(pattern: re.Pattern[str] | None = None, longest: int = 1 << 20, what: str = "") -> Check:
    """A string."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, str):
            say(problems, path, f"must be a string, is {name_of(value)}")
        elif len(value) > longest or (pattern is not None and not pattern.fullmatch(value)):
            say(problems, path, f"{value[:80]!r} {what or 'has the wrong form'}")

    return check


LABEL = text(DNS_LABEL, 63, "must be a DNS label: lower-case letters, digits and '-', at most 63")
SUBDOMAIN = text(DNS_NAME, 253, "must be a DNS name: lower-case letters, digits, '-' and '.', at most 253")
TEXT = text()


def integer(low: int, high: int = (1 << 31) - 1) -> Check:
    """A whole number."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            say(problems, path, f"must be a whole number, is {name_of(value)}")
        elif not low <= value <= high:
            say(problems, path, f"{value} must be from {low} to {high}")

    return check


PORT = integer(1, 65535)


def boolean(value: Any, path: str, problems: list[Problem]) -> None:
    """true or false."""
    if not isinstance(value, bool):
        say(problems, path, f"must be true or false, is {name_of(value)}")


def port_or_name(value: Any, path: str, problems: list[Problem]) -> None:
    """A port's number or its name."""
    if isinstance(value, str):
        text(PORT_NAME, 15, "must be a port's number or name")(value, path, problems)
    else:
        PORT(value, path, problems)


def only(*allowed: Any) -> Check:
    """One of a few values; others are known to Kubernetes, but the lab does not honour them."""
    words = " or ".join(str(item).lower() if isinstance(item, bool) else str(item) for item in allowed)

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not any(value == item and type(value) is type(item) for item in allowed):
            say(problems, path, f"{str(value)[:80]!r}: the lab honours {words} only", "FieldValueNotSupported")

    return check


def listing(item: Check, unique: str = "", least: int = 0, most: int = 1000) -> Check:
    """A list; `unique` is the field that tells its items apart."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, list):
            say(problems, path, f"must be a list, is {name_of(value)}")
            return
        if len(value) < least:
            say(problems, path, f"must have at least {least} item(s)", "FieldValueRequired")
        if len(value) > most:
            say(problems, path, f"must have at most {most} items, has {len(value)}")
            return
        seen = set()
        for index, element in enumerate(value):
            item(element, f"{path}[{index}]", problems)
            if unique and isinstance(element, dict) and unique in element:
                name = str(element[unique])
                if name in seen:
                    say(problems, f"{path}[{index}].{unique}", repr(name), "FieldValueDuplicate")
                seen.add(name)

    return check


def mapping(key: re.Pattern[str], value: Check, what: str = "is not a valid key") -> Check:
    """A map from strings."""

    def check(found: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(found, dict):
            say(problems, path, f"must be a map, is {name_of(found)}")
            return
        for name, item in found.items():
            if len(name) > LONGEST_KEY or not key.fullmatch(name):
                say(problems, path, f"{name[:80]!r} {what}")
            value(item, f"{path}.{name}", problems)

    return check


LABELS = mapping(QUALIFIED, text(LABEL_VALUE, 63, "must be letters, digits, '-', '_' and '.', at most 63"))
ANNOTATIONS = mapping(QUALIFIED, TEXT)


def structure(fields: Mapping[str, Check], required: tuple[str, ...] = (), one_of: tuple[str, ...] = ()) -> Check:
    """An object with these fields and no others; `one_of`: exactly one of these is there."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, dict):
            say(problems, path, f"must be an object, is {name_of(value)}")
            return
        dot = f"{path}." if path else ""
        for name, item in value.items():
            found = fields.get(name)
            if found is None:
                say(problems, f"{dot}{name}", "the lab does not honour this field", "FieldValueForbidden")
            else:
                found(item, f"{dot}{name}", problems)
        for name in required:
            if name not in value or value[name] in ("", []):
                say(problems, f"{dot}{name}", "must be given", "FieldValueRequired")
        if one_of and sum(name in value for name in one_of) != 1:
            say(problems, path, f"must have exactly one of {', '.join(one_of)}", "FieldValueRequired")

    return check


def name_of(value: Any) -> str:
    """What kind of JSON value this is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
