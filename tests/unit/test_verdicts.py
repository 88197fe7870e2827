"""What is told about policies, against an API that says what it is told: written once, kept beside what others wrote,
tried again where it is refused, and never in the way of others.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sidestep.control import objects, verdicts
from sidestep.control.rulings import Rulings
from sidestep.control.verdicts import TYPE, Verdicts
from sidestep.kube.client import KubeClient
from tests.harness.kubernetes import Kubernetes, kubernetes, refusal
from tests.harness.policies import authorization, peer

HANG_S = 20.0
L7 = {"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}
Answer = tuple[int, Any]


class Told:
    """An API that keeps what is written to it."""

    def __init__(self, api: Kubernetes, client: KubeClient) -> None:
        self.api = api
        self.client = client
        self.rulings = Rulings("istio-system")
        self.verdicts = Verdicts(client)
        self.statuses: list[tuple[str, Any]] = []
        self.events: list[tuple[str, Any]] = []
        self.refuse: Callable[[str, str], Answer | None] = lambda method, path: None
        self._last = 0
        api.answers = self._answer

    def _answer(self, method: str, path: str, body: Any) -> Answer:
        refused = self.refuse(method, path)
        if refused is not None:
            return refused
        name = path.removesuffix("/status").rpartition("/")[2]
        if path.endswith("/status"):
            self.statuses.append((name, body))
        elif method != "GET":
            self.events.append((method, body))
        return 200, {"count": 3}

    def put(self, obj: dict[str, Any], there: bool = True) -> None:
        """An object is new, changed or gone."""
        key = f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"
        obj = copy.deepcopy(obj)
        if obj["kind"] == "AuthorizationPolicy":
            self.rulings.authorization_policy(key, objects.authorization_policy_of(obj) if there else None)
        else:
            self.rulings.peer_authentication(key, objects.peer_authentication_of(obj) if there else None)
        self.verdicts.take(self.rulings)

    async def until(self, good: Callable[[], bool]) -> None:
        """Waits for something."""
        while not good():
            await asyncio.sleep(0.001)

    async def quiet(self) -> None:
        """Everything due has been tried: one that came last has been, and its answer is there."""
        self._last += 1
        name = f"last{self._last}"
        self.put(authorization({}, name=name))
        await self.until(lambda: any(each == name for each, _ in self.statuses))
        await self.until(lambda: self.verdicts.written == len(self.statuses))

    def names(self) -> list[str]:
        """Whose status was written."""
        return [name for name, _ in self.statuses if not name.startswith("last")]


def with_api(test: Callable[[Told], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def whole() -> None:
            async with asyncio.timeout(HANG_S), kubernetes() as api, api.client() as client:
                told = Told(api, client)
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(told.verdicts.run(), name="verdicts")
                    await test(told)
                    task.cancel()

        asyncio.run(whole())

    run.__name__ = test.__name__
    return run


@with_api
async def test_a_condition_is_written_once_and_beside_others(told: Told) -> None:
    other = {"type": "Other", "status": "True"}
    obj = authorization(L7, resourceVersion="7", generation=3) | {"status": {"conditions": [other]}}
    told.put(obj)
    await told.quiet()
    name, body = told.statuses[0]
    first, ours = body["status"]["conditions"]
    assert name == "p" and body["metadata"] == {"resourceVersion": "7"} and first == other
    since = ours.pop("lastTransitionTime")
    assert ours == {
        "type": TYPE,
        "status": "False",
        "reason": "UnsupportedValue",
        "message": "spec.rules[0]: NOT ENFORCED, left out: L4 does not know to[0].operation.methods",
        "observedGeneration": 3,
    }
    says = [first, ours | {"lastTransitionTime": since}]
    told.put(obj | {"status": {"conditions": says}, "metadata": obj["metadata"] | {"resourceVersion": "8"}})
    await told.quiet()
    assert told.names() == ["p"]  # it says so already

    changed = obj | {"status": {"conditions": says}, "metadata": obj["metadata"] | {"generation": 4}}
    told.put(changed)  # another generation: said anew, since when it holds stays
    await told.quiet()
    assert told.names() == ["p", "p"]
    body = next(body for name, body in reversed(told.statuses) if name == "p")
    assert body["status"]["conditions"][1] == says[1] | {"observedGeneration": 4}


@with_api
async def test_a_new_process_writes_nothing_that_is_there(told: Told) -> None:
    told.put(authorization({}))
    await told.quiet()
    told.put(authorization({}) | {"status": told.statuses[0][1]["status"]})
    fresh = Told(told.api, told.client)
    fresh.put(authorization({}) | {"status": told.statuses[0][1]["status"]})
    assert fresh.verdicts.status()["due"] == 0 == told.verdicts.status()["due"]
    fresh.put(authorization({}) | {"status": {"conditions": "odd"}})
    assert fresh.verdicts.status()["due"] == 1  # the control


@with_api
async def test_a_refusal_is_tried_again_and_hinders_no_other(told: Told) -> None:
    denied = (403, refusal("Forbidden", "no"))
    told.refuse = lambda method, path: denied if "/bad/" in path else None
    told.put(authorization({}, name="bad"))
    await told.until(lambda: bool(told.api.asked))
    for number in range(20):
        told.put(authorization({}, name=f"good{number}"))
    await told.quiet()
    assert sorted(told.names()) == sorted(f"good{number}" for number in range(20))
    assert told.verdicts.status()["failed"] == {"AuthorizationPolicy shop/bad": "Forbidden: no"}
    told.refuse = lambda method, path: None
    await told.until(lambda: "bad" in told.names())
    await told.quiet()
    assert told.verdicts.status() == {"written": 23, "due": 0, "failed": {}}


def test_it_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "BACKOFF_S", (0.01, 0.04))

    @with_api
    async def longer(told: Told) -> None:
        pauses: list[float] = []

        def refuse(method: str, path: str) -> Answer | None:
            due = told.verdicts._due["AuthorizationPolicy", "shop/p"]
            pauses.append(due.pause_s)
            return (500, refusal("InternalError", "x")) if len(pauses) < 6 else None

        told.refuse = refuse
        told.put(authorization({}))
        await told.until(lambda: bool(told.names()))
        assert pauses == [0.01, 0.02, 0.04, 0.04, 0.04, 0.04]

    longer()


@with_api
async def test_of_two_writers_the_second_looks_again(told: Told) -> None:
    told.refuse = lambda method, path: (409, refusal("Conflict", "modified")) if path.endswith("/p/status") else None
    told.put(authorization(L7, resourceVersion="1"))
    await told.until(lambda: bool(told.api.asked))
    told.refuse = lambda method, path: None
    theirs = {"type": "Other", "status": "True"}
    told.put(authorization(L7, resourceVersion="2") | {"status": {"conditions": [theirs]}})
    await told.until(lambda: "p" in told.names())
    _, body = told.statuses[-1]
    assert body["metadata"]["resourceVersion"] == "2" and body["status"]["conditions"][0] == theirs


def test_two_that_disagree_take_turns_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "BACKOFF_S", (0.001, 0.016))

    @with_api
    async def turns(told: Told) -> None:
        pauses = []
        for number in range(1, 9):
            told.put(authorization({}, resourceVersion=f"{number}"))  # the condition is not there any more
            pauses.append(told.verdicts._due["AuthorizationPolicy", "shop/p"].pause_s)
            await told.until(lambda number=number: told.verdicts.written == number)  # type: ignore[misc]
        assert pauses == [0.001, 0.002, 0.004, 0.008, 0.016, 0.016, 0.016, 0.016]
        told.put(authorization({}, generation=2))
        assert told.verdicts._due["AuthorizationPolicy", "shop/p"].at_s == 0.0  # what is new is said at once

    turns()


@with_api
async def test_what_is_gone_is_forgotten(told: Told) -> None:
    told.refuse = lambda method, path: (404, refusal("NotFound", "x")) if path.endswith("/p/status") else None
    told.put(authorization(L7))
    await told.quiet()
    assert told.verdicts.status()["due"] == 0 and not told.verdicts.failed
    told.refuse = lambda method, path: (403, refusal("Forbidden", "x")) if path.endswith("/q/status") else None
    told.put(authorization(L7, name="q"))
    await told.quiet()
    assert told.verdicts.status()["due"] == 1
    told.put(authorization(L7, name="q"), there=False)
    assert told.verdicts.status()["due"] == 0 and not told.verdicts.failed


@with_api
async def test_events_tell_of_refusals_only_and_count(told: Told) -> None:
    told.put(authorization({}, name="fine"))
    told.put(authorization(L7, name="web" * 80))
    told.put(peer("DISABLE", name="peer"))
    await told.quiet()
    await told.until(lambda: len(told.events) == 2)
    found = {body["involvedObject"]["name"]: body for _, body in told.events}
    assert set(found) == {"web" * 80, "peer"}
    event = found["web" * 80]
    assert event["involvedObject"]["uid"] and event["type"] == "Warning" and event["count"] == 1
    assert len(event["metadata"]["name"]) <= 253 and len(event["message"]) <= 1000
    told.events.clear()
    told.refuse = lambda method, path: (409, refusal("AlreadyExists", "x")) if method == "POST" else None
    told.put(authorization(L7, name="again"))
    await told.until(lambda: bool(told.events))
    assert told.events[0][0] == "PATCH" and told.events[0][1]["count"] == 4


@with_api
async def test_an_event_that_is_refused_is_not_tried_again(told: Told) -> None:
    told.refuse = lambda method, path: (403, refusal("Forbidden", "x")) if "/events" in path else None
    told.put(authorization(L7))
    await told.quiet()
    assert told.verdicts.status()["due"] == 0 and told.names() == ["p"]
    assert sum("/events" in path for _, path in told.api.asked) == 1


@with_api
async def test_a_waypoints_policy_is_not_ours_to_write_to(told: Told) -> None:
    told.put(authorization({"targetRefs": [{"kind": "Service", "name": "a"}]}))
    await told.quiet()
    assert told.names() == [] and not told.events


def test_the_log_says_each_thing_once(capfd: pytest.CaptureFixture[str]) -> None:
    @with_api
    async def once(told: Told) -> None:
        many = {"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}] * 30}
        for version in range(3):
            told.put(authorization(many, resourceVersion=f"{version}"))
        await told.quiet()

    once()
    lines = [line for line in capfd.readouterr().err.splitlines() if " policy_not_enforced " in line]
    assert len(lines) == verdicts.LINES + 1 and "10 lines more" in lines[-1]
    assert all("level=WARN" in line and "policy=shop/p" in line for line in lines)
    assert all(f"spec.rules[{number}]" in line for number, line in enumerate(lines[:-1]))
