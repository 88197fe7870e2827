"""Events about pods that cannot be enrolled: who gets one, how often, and what an API that refuses costs."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidestep.node import events
from sidestep.node.agent import ADD_FAILURES, Agent, Place
from sidestep.node.api import ClusterApi
from sidestep.node.events import Cause, Reporter, causes, event_of
from sidestep.node.metrics import Metrics
from sidestep.node.pods import Pod
from sidestep.node.reconcile import Desired, Step
from sidestep.node.resident import ApiError, Names, Resident
from tests.harness.kubernetes import kubernetes, refusal

POD = Pod("u1", "shop", "web", "web", "n1", False, "Running", False, ("10.0.0.1",), "", False, "", False)
URI = "spiffe://cluster.local/ns/shop/sa/web"


def agent(*pods: Pod, mode: str = "ambient") -> Agent:
    """An agent that knows these pods and does not run."""
    nobody: Any = None
    names = Names("cluster.local", "Kubernetes", 0, None)
    made = Agent(Place("n1", {}), names, nobody, Path("none"), nobody, nobody, nobody, Metrics(), lambda: 0.5)
    made.namespaces = {"shop": mode, "kube-system": mode}
    made.pods = {pod.uid: pod for pod in pods}
    return made


def wanted(pod: Pod, **changes: Any) -> Resident:
    resident = Resident(pod.uid, pod=pod, want=Desired(True, True))
    for name, value in changes.items():
        setattr(resident, name, value)
    return resident


@pytest.mark.parametrize(
    ("pod", "mode", "reason"),
    [
        (POD, "ambient", ""),
        (replace(POD, host_network=True), "ambient", "NotEnrolled"),
        (replace(POD, host_network=True), "", ""),
        (replace(POD, host_network=True, mode="ambient"), "", "NotEnrolled"),
        (replace(POD, host_network=True, mode="none"), "ambient", ""),
        (replace(POD, host_network=True, phase="Succeeded"), "ambient", ""),
        (replace(POD, sidecar=True), "ambient", "NotEnrolled"),
        (replace(POD, namespace="kube-system"), "ambient", "NotEnrolled"),
        (replace(POD, namespace="kube-system"), "", ""),
        (replace(POD, mode="none"), "ambient", ""),
    ],
)
def test_labelled_and_impossible(pod: Pod, mode: str, reason: str) -> None:
    assert [cause.reason for cause in causes(agent(pod, mode=mode))] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"failures": ADD_FAILURES - 1, "error": "no"}, ""),
        ({"failures": ADD_FAILURES, "error": "tc said no", "step": Step.STRICT}, "step 'strict' failed: tc said no"),
        ({"step": Step.WAIT_NETNS, "searches": events.NETNS_SEARCHES - 1}, ""),
        ({"step": Step.WAIT_NETNS, "searches": events.NETNS_SEARCHES}, "no network namespace is known"),
        ({"failures": ADD_FAILURES, "error": "no", "want": Desired(True, False)}, ""),
    ],
)
def test_steps_that_fail(changes: Any, said: str) -> None:
    one = agent(POD)
    one.residents = {POD.uid: wanted(POD, **changes)}
    found = list(causes(one))
    assert [cause.reason for cause in found] == (["EnrolmentFailed"] if said else [])
    assert all(said in cause.message for cause in found)


def test_an_identity_without_certificate_is_its_pods_cause() -> None:
    one = agent(POD)
    one.residents = {POD.uid: wanted(POD)}
    one.identities.need([URI], 0.0)
    assert list(causes(one)) == []
    one.identities.failed(URI, "UNAVAILABLE: away", 0.0)
    [cause] = causes(one)
    assert cause.reason == "NoCertificate" and URI in cause.message and "UNAVAILABLE: away" in cause.message


class Api:
    """Takes Events; refuses or hangs on demand."""

    def __init__(self) -> None:
        self.written: list[Mapping[str, Any]] = []
        self.refuse = self.hang = False
        self.now = 1000.0

    async def write(self, event: Mapping[str, Any]) -> None:
        if self.hang:
            await asyncio.Event().wait()
        if self.refuse:
            raise ApiError("Forbidden: no")
        self.written.append(event)

    def clock(self) -> float:
        return self.now


def working(work: Callable[[Api, Reporter], Any]) -> None:
    async def run() -> None:
        api = Api()
        reporter = Reporter("n1", api.write, api.clock)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(reporter.run())
            await work(api, reporter)
            task.cancel()

    asyncio.run(run())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_one_event_for_a_cause_counted_when_it_lasts() -> None:
    async def work(api: Api, reporter: Reporter) -> None:
        for _ in range(100):
            reporter.note(Cause(POD, "EnrolmentFailed", "once"))
            api.now += events.REPEAT_S / 101
        await settled()
        assert [event["count"] for event in api.written] == [1]
        reporter.note(Cause(POD, "NoCertificate", "another cause"))
        reporter.note(Cause(replace(POD, uid="u2"), "EnrolmentFailed", "another pod"))
        api.now += events.REPEAT_S
        reporter.note(Cause(POD, "EnrolmentFailed", "again"))
        await settled()
        assert [(event["message"], event["count"]) for event in api.written] == [
            ("once", 1),
            ("another cause", 1),
            ("another pod", 1),
            ("again", 2),
        ]
        assert api.written[0]["metadata"]["name"] == api.written[3]["metadata"]["name"]
        assert len({event["metadata"]["name"] for event in api.written}) == 3
        assert api.written[0]["firstTimestamp"] == api.written[3]["firstTimestamp"]

    working(work)


def test_what_is_gone_with_the_next_attempt_is_no_event() -> None:
    async def work(api: Api, reporter: Reporter) -> None:
        passing, never = Cause(POD, "EnrolmentFailed", "busy"), Cause(POD, "NotEnrolled", "never", passing=False)
        reporter.look([passing, never])
        await settled()
        assert [event["reason"] for event in api.written] == ["NotEnrolled"]
        api.now += events.LASTS_S - 1
        reporter.look([passing])
        api.now += 0.5
        reporter.look([])  # it went, and comes again
        api.now += 0.5
        reporter.look([passing])
        await settled()
        assert len(api.written) == 1
        api.now += events.LASTS_S
        reporter.look([passing])
        await settled()
        assert [event["reason"] for event in api.written] == ["NotEnrolled", "EnrolmentFailed"]

    working(work)


def test_it_is_written_once_and_then_counted() -> None:
    """Against an API that knows names: the second is a patch; a namespace that goes is no error."""

    async def run() -> None:
        async with kubernetes() as api, api.client() as client:
            there: set[str] = set()

            def answers(method: str, path: str, body: Any) -> tuple[int, Any] | None:
                if method == "PATCH" and path == "/api/v1/namespaces/shop/events/e":
                    patches.append(body)
                    return 200, body
                if method == "POST" and path == "/api/v1/namespaces/gone/events":
                    return 403, refusal("Forbidden", "unable to create: namespace gone is being terminated")
                if method == "POST" and path == "/api/v1/namespaces/closed/events":
                    return 403, refusal("Forbidden", "no")
                if method == "POST" and body["metadata"]["name"] in there:
                    return 409, refusal("AlreadyExists", "it is there")
                there.add(body["metadata"]["name"])
                return 201, body

            patches: list[Any] = []
            api.answers = answers
            made = ClusterApi(client, "istio-system")
            for count in (1, 2):
                await made.report(_event("shop", count))
            assert patches == [{"count": 2, "lastTimestamp": "now", "message": "m"}]
            await made.report(_event("gone", 1))
            with pytest.raises(ApiError, match="Forbidden"):
                await made.report(_event("closed", 1))

    asyncio.run(run())


def _event(namespace: str, count: int) -> dict[str, Any]:
    return {
        "metadata": {"name": "e", "namespace": namespace},
        "count": count,
        "lastTimestamp": "now",
        "firstTimestamp": "then",
        "message": "m",
    }


def test_a_storm_is_bounded() -> None:
    async def work(api: Api, reporter: Reporter) -> None:
        for number in range(3 * events.KNOWN):
            reporter.note(Cause(replace(POD, uid=f"u{number}"), "EnrolmentFailed", "all at once"))
        await settled()
        assert len(api.written) <= events.BURST
        assert reporter.dropped >= 3 * events.KNOWN - events.WAITING - events.BURST

    working(work)


def test_an_api_that_refuses_costs_the_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "REPORT_S", 0.01)

    async def work(api: Api, reporter: Reporter) -> None:
        api.refuse = True
        reporter.note(Cause(POD, "A", "refused"))
        await settled()
        api.refuse, api.hang = False, True
        reporter.note(Cause(POD, "B", "not answered"))
        await asyncio.sleep(0.05)
        api.hang = False
        reporter.note(Cause(POD, "C", "written"))
        await settled()
        assert [event["message"] for event in api.written] == ["written"]

    working(work)


def test_what_the_api_gets() -> None:
    event = event_of(Cause(replace(POD, name="x" * 253), "NotEnrolled", "y" * 5000), "n1", 0.0, 61.0, 7)
    assert len(event["metadata"]["name"]) <= 253 and event["metadata"]["namespace"] == "shop"
    assert event["involvedObject"]["uid"] == "u1" and event["type"] == "Warning" and len(event["message"]) <= 1024
    assert (event["firstTimestamp"], event["lastTimestamp"]) == ("1970-01-01T00:00:00Z", "1970-01-01T00:01:01Z")
