"""The Kubernetes client against an API server that says what it is told: configuration, errors, watches, lists."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sidestep.kube import watch
from sidestep.kube.client import ConfigError, KubeClient, KubeError, load_config
from sidestep.kube.watch import Reflector
from tests.harness.kubernetes import HOLD, Kubernetes, event, kubernetes, refusal

HANG_S = 20.0
THINGS = "/api/v1/things"


def on_api(test: Callable[[Kubernetes, KubeClient], Awaitable[None]]) -> Callable[[], None]:
    """Runs a coroutine with a server and a client."""

    async def whole() -> None:
        async with asyncio.timeout(HANG_S), kubernetes() as api, api.client(token="secret") as client:
            await test(api, client)

    def run() -> None:
        asyncio.run(whole())

    run.__name__ = run.__qualname__ = test.__name__
    return run


def config(directory: Path, **user: str) -> Path:
    path = directory / "kubeconfig"
    lines = [f"      {key}: {value}" for key, value in user.items()]
    path.write_text(
        "\n".join(
            [
                "current-context: b",
                "contexts:",
                "  - {name: a, context: {cluster: other, user: x}}",
                "  - {name: b, context: {cluster: c, user: u}}",
                "clusters:",
                "  - name: c",
                "    cluster:",
                "      server: https://192.0.2.1:6443/",
                f"      certificate-authority-data: {base64.b64encode(b'CA').decode()}",
                "users:",
                "  - name: u",
                "    user:",
                *lines,
            ]
        )
    )
    return path


def test_config(tmp_path: Path) -> None:
    found = load_config(config(tmp_path, token="t"))
    assert (found.server, found.ca, found.token) == ("https://192.0.2.1:6443", b"CA", "t")
    assert load_config(config(tmp_path, tokenFile="/x")).token_file == Path("/x")


@pytest.mark.parametrize("text", ["", "{}", "a: [", "- x", "current-context: nowhere\ncontexts: []"])
def test_config_that_says_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigError, match="kubeconfig"):
        load_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "other")


def test_in_cluster_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="--kubeconfig"):
        load_config(None)


@on_api
async def test_requests(api: Kubernetes, client: KubeClient) -> None:
    seen: list[tuple[str, str, Any]] = []

    def answers(method: str, path: str, body: Any) -> tuple[int, Any]:
        seen.append((method, path, body))
        return 200, {"metadata": {}}

    api.answers = answers
    await client.get(THINGS, {"x": "y z"})
    await client.list(THINGS, label_selector="a=b", field_selector="metadata.name=c")
    await client.create(THINGS, {"a": 1})
    await client.update(f"{THINGS}/x", {"a": 2})
    for kind in ("merge", "strategic", "json"):
        await client.patch(f"{THINGS}/x/status", {"a": None}, kind=kind)
    await client.delete(f"{THINGS}/x", grace_s=0, uid="u")
    assert [method for method, _, _ in seen] == ["GET", "GET", "POST", "PUT", "PATCH", "PATCH", "PATCH", "DELETE"]
    assert seen[1][1] == f"{THINGS}?labelSelector=a%3Db&fieldSelector=metadata.name%3Dc"
    assert seen[-1][2]["gracePeriodSeconds"] == 0 and seen[-1][2]["preconditions"] == {"uid": "u"}
    assert all(headers["Authorization"] == "Bearer secret" for headers in api.headers)
    types = [headers.get("Content-Type") for headers in api.headers[4:7]]
    assert types == [
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
        "application/json-patch+json",
    ]


@on_api
async def test_refusals(api: Kubernetes, client: KubeClient) -> None:
    replies = [(409, refusal("Conflict", "it is another")), (503, "upstream is away"), (200, "not json")]
    api.answers = lambda method, path, body: replies.pop(0)
    for status, reason, message in (
        (409, "Conflict", "it is another"),
        (503, "", "upstream is away"),
        (0, "Unreachable", ""),
    ):
        with pytest.raises(KubeError) as caught:
            await client.get(THINGS)
        assert (caught.value.status, caught.value.reason) == (status, reason)
        assert message in caught.value.message


def test_nobody_listens() -> None:
    async def whole() -> None:
        async with asyncio.timeout(HANG_S):
            async with kubernetes() as api:
                client = api.client()
            async with client:
                with pytest.raises(KubeError, match="GET http") as caught:
                    await client.get(THINGS)
                assert caught.value.status == 0

    asyncio.run(whole())


def test_the_token_file_is_read_again_each_time(tmp_path: Path) -> None:
    async def whole() -> None:
        path = tmp_path / "token"
        async with asyncio.timeout(HANG_S), kubernetes() as api, api.client(token_file=path) as client:
            api.answers = lambda method, path, body: (200, {})
            with pytest.raises(KubeError, match="No such file"):
                await client.get(THINGS)
            for text in ("one\n", "two"):
                path.write_text(text)
                await client.get(THINGS)
            assert [headers["Authorization"] for headers in api.headers] == ["Bearer one", "Bearer two"]

    asyncio.run(whole())


@on_api
async def test_watch_takes_lines_of_any_length_and_pieces(api: Kubernetes, client: KubeClient) -> None:
    large = event("ADDED", 5, "large", data="x" * 3_000_000)
    pieces = [
        b'{"type": "MODI',
        b'FIED", "object": {"metadata": {"name": "p"}}}\n{"type": "BOOKMARK",',
        b' "object": {}}\n',
    ]
    api.watches[THINGS] = [[large, *pieces]]
    found = [(kind, obj) async for kind, obj in client.watch(THINGS, resource_version="4", label_selector="a=b")]
    assert [kind for kind, _ in found] == ["ADDED", "MODIFIED", "BOOKMARK"]
    assert len(found[0][1]["data"]) == 3_000_000
    query = api.asked[0][1]
    assert "resourceVersion=4" in query and "allowWatchBookmarks=true" in query and "labelSelector=a%3Db" in query


@on_api
async def test_watch_ends_with_the_servers_error(api: Kubernetes, client: KubeClient) -> None:
    gone = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}
    api.watches[THINGS] = [[event("ADDED", 5, "a"), gone], [410, refusal("Expired", "too old")]]
    for expected in (["ADDED"], []):
        kinds = []
        with pytest.raises(KubeError) as caught:
            async for kind, _ in client.watch(THINGS, resource_version="4"):
                kinds.append(kind)
        assert caught.value.status == 410 and kinds == expected


def listing(version: int, **things: str) -> tuple[int, Any]:
    items = [{"metadata": {"name": name}, "value": value} for name, value in things.items()]
    return 200, {"metadata": {"resourceVersion": str(version)}, "items": items}


class Seen:
    """What a reflector reported, in order, and a way to wait for it."""

    def __init__(self, client: KubeClient) -> None:
        self.changes: list[tuple[str, str | None, str | None]] = []
        self._arrived = asyncio.Event()
        self.reflector: Reflector[str] = Reflector(client, THINGS, lambda obj: str(obj.get("value", "")), self.note)

    def note(self, key: str, old: str | None, new: str | None) -> None:
        self.changes.append((key, old, new))
        self._arrived.set()

    async def until(self, count: int) -> None:
        while len(self.changes) < count:
            self._arrived.clear()
            await self._arrived.wait()


async def followed(seen: Seen, until: Callable[[], Awaitable[None]]) -> None:
    """Runs a reflector until something has happened."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(seen.reflector.run(), name="reflector")
        await until()
        task.cancel()


@on_api
async def test_reflector_lists_then_follows(api: Kubernetes, client: KubeClient) -> None:
    api.answers = lambda method, path, body: listing(7, a="1", b="1")
    api.watches[THINGS] = [
        [
            event("MODIFIED", 8, "a", value="2"),
            event("MODIFIED", 9, "a", value="2", other="change"),
            event("BOOKMARK", 20),
            event("DELETED", 21, "b"),
            event("DELETED", 22, "never"),
            event("ADDED", 23, "c", value="1"),
        ],
        [event("ADDED", 24, "d", value="1"), HOLD],
    ]
    seen = Seen(client)
    assert not seen.reflector.synced.is_set()
    await followed(seen, lambda: seen.until(6))
    assert seen.changes == [
        ("a", None, "1"),
        ("b", None, "1"),
        ("a", "1", "2"),
        ("b", "1", None),
        ("c", None, "1"),
        ("d", None, "1"),
    ]
    assert seen.reflector.items == {"a": "2", "c": "1", "d": "1"} and seen.reflector.synced.is_set()
    versions = [query.partition("resourceVersion=")[2].partition("&")[0] for _, query in api.asked]
    assert versions == ["", "7", "23"]  # an ended watch goes on where it was, without a list


@on_api
async def test_reflector_lists_again_when_the_version_is_gone(api: Kubernetes, client: KubeClient) -> None:
    lists = [listing(7, a="1", b="1"), listing(90, a="1", b="2", c="1")]
    api.answers = lambda method, path, body: lists.pop(0)
    gone = {"type": "ERROR", "object": {"code": 410, "reason": "Expired"}}
    api.watches[THINGS] = [[event("ADDED", 8, "lost", value="1"), gone], [HOLD]]
    seen = Seen(client)
    await followed(seen, lambda: seen.until(6))
    assert seen.changes[3:] == [("lost", "1", None), ("b", "1", "2"), ("c", None, "1")]
    assert seen.reflector.items == {"a": "1", "b": "2", "c": "1"}


def test_reflector_of_a_kind_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its definition may come later, and an API that starts up may deny for a while what it has."""
    monkeypatch.setattr(watch, "ABSENT_S", 0.0)

    @on_api
    async def optional(api: Kubernetes, client: KubeClient) -> None:
        changes: list[tuple[str, str | None, str | None]] = []
        there: Reflector[str] = Reflector(
            client,
            THINGS,
            lambda obj: str(obj.get("value", "")),
            lambda *change: changes.append(change),
            optional=True,
        )
        never: Reflector[str] = Reflector(client, THINGS, str, lambda *_: None)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.run(), name="reflector") for each in (there, never)]
            await there.synced.wait()
            assert not there.items and there.failed is None
            while never.failed is None:
                await asyncio.sleep(0.01)
            assert not never.synced.is_set()  # the control: one that must be there
            api.watches[THINGS] = [[410, {"code": 410, "reason": "Expired"}]] * 2
            api.answers = lambda method, path, body: listing(7, a="1")
            while not there.items:
                await asyncio.sleep(0.01)
            api.answers = lambda method, path, body: None
            while there.failed is None:
                await asyncio.sleep(0.01)
            assert there.items == {"a": "1"} and changes == [("a", None, "1")]  # a 404 takes nothing away
            for task in tasks:
                task.cancel()

    optional()


def test_a_kind_that_is_not_there_for_a_moment_is_waited_for() -> None:
    @on_api
    async def moment(api: Kubernetes, client: KubeClient) -> None:
        reflector: Reflector[str] = Reflector(client, THINGS, str, lambda *_: None, optional=True)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(reflector.run(), name="reflector")
            while reflector.failed is None:
                await asyncio.sleep(0.01)
            assert not reflector.synced.is_set()
            api.answers = lambda method, path, body: listing(7, a="1")
            await reflector.synced.wait()
            assert reflector.items
            task.cancel()

    moment()


@on_api
async def test_reflector_outlives_an_api_that_does_not(api: Kubernetes, client: KubeClient) -> None:
    replies = [(503, "starting"), (403, refusal("Forbidden", "no")), listing(7, a="1")]
    api.answers = lambda method, path, body: replies.pop(0)
    api.watches[THINGS] = [
        [event("ADDED", 8, "b", value="1"), b'{"type": "ADDED", "obj'],
        [event("ADDED", 9, "c"), HOLD],
    ]
    seen = Seen(client)
    await followed(seen, lambda: seen.until(3))
    assert set(seen.reflector.items) == {"a", "b", "c"}
    assert not replies and seen.reflector.failed is None


@pytest.mark.parametrize("trouble", ["list fails", "watch ends at once", "version is gone at once"])
def test_reflector_waits_longer_each_time(trouble: str) -> None:
    asyncio.run(_waits(trouble))


async def _waits(trouble: str) -> None:
    async with asyncio.timeout(HANG_S), kubernetes() as api, api.client() as client:
        await _waits_on(api, client, trouble)


async def _waits_on(api: Kubernetes, client: KubeClient, trouble: str) -> None:
    api.answers = lambda method, path, body: (500, "broken") if trouble == "list fails" else listing(7)
    api.watches[THINGS] = [[410, refusal("Expired", "")] if trouble.startswith("version") else [] for _ in range(20)]
    waits: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 12:
            enough.set()
            await asyncio.Event().wait()

    seen = Seen(client)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        await followed(seen, lambda: _set(enough))
    first, last = watch.BACKOFF_S
    assert waits[0] <= first * 1.2 and last * 0.8 <= waits[-1] <= last * 1.2
    assert (seen.reflector.failed is not None) is (trouble == "list fails")


async def _set(happened: asyncio.Event) -> None:
    await happened.wait()
