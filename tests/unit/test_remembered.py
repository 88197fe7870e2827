"""What stands in for policies that cannot be read is kept over a restart, against an API that says what it is told."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sidestep.control import objects, remembered
from sidestep.control.remembered import Remembered
from sidestep.control.rulings import Rulings
from sidestep.kube.client import KubeClient, KubeError
from tests.harness.kubernetes import Kubernetes, kubernetes, refusal
from tests.harness.policies import authorization

HANG_S = 20.0
GOOD = authorization({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]})


def bad() -> dict[str, Any]:
    made = copy.deepcopy(GOOD)
    made["spec"]["rules"] = [7]
    return made


class Api:
    """An API with one ConfigMap."""

    def __init__(self, api: Kubernetes, client: KubeClient) -> None:
        self.client = client
        self.data: dict[str, str] | None = None
        self.refused: tuple[int, Any] | None = None
        self.asked = 0
        api.answers = self._answer

    def _answer(self, method: str, path: str, body: Any) -> tuple[int, Any] | None:
        self.asked += 1
        if self.refused is not None:
            return self.refused
        if method == "POST":
            assert path == "/api/v1/namespaces/istio-system/configmaps"
            assert body["metadata"]["name"] == "sidestep-policies"
            self.data = body["data"]
        elif self.data is None:
            return None
        elif method == "PATCH":
            self.data = {key: text for key, text in (self.data | body["data"]).items() if text is not None}
        return 200, {"data": self.data}

    def memory(self) -> Remembered:
        """A new process's."""
        return Remembered(self.client, "istio-system")


def with_api(test: Callable[[Api], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def whole() -> None:
            async with asyncio.timeout(HANG_S), kubernetes() as api, api.client() as client:
                await test(Api(api, client))

        asyncio.run(whole())

    run.__name__ = test.__name__
    return run


def rulings(*things: dict[str, Any]) -> Rulings:
    made = Rulings("istio-system")
    for each in things:
        made.authorization_policy("shop/p", objects.authorization_policy_of(copy.deepcopy(each)))
    return made


async def told(memory: Remembered, now: Rulings, until: Callable[[], bool]) -> None:
    """Tells what is, and waits for what comes of it."""
    memory.take(now)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(memory.run(), name="remembered")
        while not until():
            await asyncio.sleep(0.001)
        task.cancel()


@with_api
async def test_there_and_back(api: Api) -> None:
    memory = api.memory()
    assert await memory.load() == {}
    memory.take(rulings(GOOD))
    assert memory.status() == {"versions": 0, "failed": ""}
    now = rulings(GOOD, bad())
    await told(memory, now, lambda: memory.status()["versions"] == 1)
    found = await api.memory().load()
    assert found.keys() == now.kept().keys()
    for key, policy in now.kept().items():
        assert policy.means(found[key])

    again = api.memory()
    after = rulings()
    after.recall(await again.load())
    after.authorization_policy("shop/p", objects.authorization_policy_of(bad()))
    asked = api.asked
    again.take(after)
    assert again._wanted == again._stored and api.asked == asked  # it is as it was
    after.authorization_policy("shop/p", None)
    await told(again, after, lambda: again.status()["versions"] == 0)
    assert api.data == {} and await api.memory().load() == {}


@with_api
async def test_what_is_of_nobody_goes(api: Api) -> None:
    api.data = {"AuthorizationPolicy.x": "{", "AuthorizationPolicy.y": "[]", "AuthorizationPolicy.z": '{"kind": 7}'}
    memory = api.memory()
    assert await memory.load() == {} and memory.status()["versions"] == 3
    await told(memory, rulings(), lambda: memory.status()["versions"] == 0)
    assert api.data == {}


@with_api
async def test_an_api_that_does_not_answer_is_waited_for_and_one_that_refuses_is_not(api: Api) -> None:
    for status in (500, 503, 429):
        api.refused = (status, refusal("x", "y"))
        with pytest.raises(KubeError):
            await api.memory().load()
    api.refused = (403, refusal("Forbidden", "no"))
    memory = api.memory()
    assert await memory.load() == {} and memory.status()["failed"] == "Forbidden: no"


def test_a_write_that_is_refused_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "BACKOFF_S", (0.001, 0.002))

    @with_api
    async def again(api: Api) -> None:
        memory = api.memory()
        api.refused = (403, refusal("Forbidden", "no"))
        now = rulings(GOOD, bad())
        await told(memory, now, lambda: api.asked >= 5)
        assert memory.status() == {"versions": 0, "failed": "Forbidden: no"}
        api.refused = None
        await told(memory, now, lambda: memory.status() == {"versions": 1, "failed": ""})

    again()
