"""Pins of the layouts before: what an agent of that time left in a pod is taken over, with nothing let through, nothing
cut and nothing left behind.
"""

import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sidestep._bpf import ffi, lib
from sidestep.lab.link import Tap
from sidestep.node.netns import Record, Records, open_path
from sidestep.node.pods import Pod
from sidestep.node.reconcile import Capture as Mode
from tests.harness.cluster import Nodes
from tests.harness.former import Former
from tests.harness.kubelet import Map, packed
from tests.harness.netns import Pair, connect, listen
from tests.harness.netns import run as tool
from tests.harness.pods import Client, Sandbox, echo
from tests.harness.stand_in import Capture, CaptureError, StandIn
from tests.net.test_agent import PORT, Node, node, run
from tests.net.test_agent_vouched import allow, native
from tests.net.test_capture import eventually, payload_out
from tests.net.test_engine_policy import talk

__all__ = ["node"]

FAR = 80
Close = Callable[..., None]


class Old:
    """A pod with programs of a former layout; `now`: what the layout of now makes of it."""

    def __init__(self, link: Pair, folder: Path, layout: str, door: bool = False) -> None:
        self.now = Capture(link, door=door)
        self.former = Former(Path(self.now.pins.decode()).parents[1], link.pod, link, folder, layout)

    def upgrade(self) -> None:
        error = ffi.new("char[]", lib.CAPTURE_ERROR_LEN)
        result = lib.capture_upgrade(str(self.former.pins).encode(), self.now.pins, error)
        assert result == 0, ffi.string(error).decode()


@pytest.fixture(params=["v1", "v2"])
def old(request: pytest.FixtureRequest, link: Pair, tmp_path: Path) -> Iterator[Old]:
    made = Old(link, tmp_path, request.param)
    try:
        yield made
    finally:
        with suppress(CaptureError):
            made.now.detach()
        made.former.remove()


class Storm:
    """One connection after another, out of the pod and into it, each of which the engine must get."""

    def __init__(self, engine: StandIn, link: Pair, family: int) -> None:
        self.done = {"out": 0, "in": 0}
        self.failed: list[BaseException] = []
        self._stop = threading.Event()
        ways = (
            ("out", link.pod_path, link.far(family), FAR, engine.outbound),
            ("in", link.outside_path, link.pod_address(family), 8080, engine.inbound),
        )
        self._threads = [threading.Thread(target=self._blow, args=way) for way in ways]

    def _blow(self, way: str, path: str, address: str, port: int, listener: socket.socket) -> None:
        try:
            while not self._stop.is_set():
                with connect(path, address, port) as client:
                    served, _ = listener.accept()
                    with served:
                        client.sendall(b"x")
                        assert served.recv(1) == b"x"
                self.done[way] += 1
        except BaseException as error:
            self.failed.append(error)

    def __enter__(self) -> "Storm":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.failed == []

    def more(self) -> None:
        """Waits for ten of each."""
        before = dict(self.done)
        eventually(
            "the storm goes on", lambda: self.failed or all(self.done[way] >= before[way] + 10 for way in before)
        )


def test_a_strict_pod_stays_captured_and_served(old: Old, link: Pair, family: int, closing: Close) -> None:
    """No connection is refused, none goes to another end, no byte leaves."""
    old.former.mode(lib.MODE_STRICT)
    engine = StandIn(old.former)
    held = connect(link.pod_path, link.far(family), FAR)
    held_by, _ = engine.outbound.accept()
    closing(engine, held, held_by)
    listener = listen(link.outside_path, link.far(family), FAR)
    closing(listener, listen(link.pod_path, link.pod_address(family), 8080))
    with Tap(link.outside_path, "eth0") as tap:
        with Storm(engine, link, family) as storm:
            storm.more()
            old.upgrade()
            storm.more()
            assert old.now.verify() == (
                lib.CAPTURE_NO_IN_LO | lib.CAPTURE_NO_OUT_LO | lib.CAPTURE_NO_IN_ETH | lib.CAPTURE_NO_OUT_ETH
            )
            old.now.set_mode(lib.MODE_STRICT)
            storm.more()
        held.sendall(b"still")
        assert held_by.recv(10) == b"still"
        assert payload_out(tap.flows(), link) == b""
        control = engine.connect(link.far(family), FAR)
        control.sendall(b"the tap sees what leaves")
        closing(control, listener.accept()[0])
        eventually("the control", lambda: b"the tap sees" in payload_out(tap.flows(), link))
    assert old.now.verify() == 0
    assert old.now.listeners() == 7
    assert not old.former.pins.parent.joinpath("node").exists() and not old.former.pins.exists()
    old.upgrade()  # there is nothing to do
    assert old.now.verify() == 0


def test_connections_from_before_the_enrolment_go_on(old: Old, link: Pair, family: int, closing: Close) -> None:
    far = listen(link.outside_path, link.far(family), FAR)
    before = connect(link.pod_path, link.far(family), FAR)
    before_far, _ = far.accept()
    old.former.mode(lib.MODE_NOTING)
    engine = StandIn(old.former)
    before.sendall(b"x")  # is noted
    assert before_far.recv(1) == b"x"
    old.former.mode(lib.MODE_LENIENT)
    captured = connect(link.pod_path, link.far(family), FAR)
    captured_by, _ = engine.outbound.accept()
    closing(far, before, before_far, engine, captured, captured_by)
    old.upgrade()
    old.now.set_mode(lib.MODE_LENIENT)
    assert old.now.verify() == 0
    for end in (before_far, captured_by):
        end.settimeout(20)
    for one, other in ((before, before_far), (before_far, before), (captured, captured_by), (captured_by, captured)):
        one.sendall(b"on")
        assert other.recv(10) == b"on"
    assert old.now.old() == 1
    new = connect(link.pod_path, link.far(family), FAR)
    closing(new, engine.outbound.accept()[0])


def test_what_was_cut_off_in_the_middle_is_finished(old: Old, link: Pair, closing: Close) -> None:
    old.former.mode(lib.MODE_STRICT)
    engine = StandIn(old.former)
    pins = Path(old.now.pins.decode())
    pins.mkdir(parents=True)
    os.link(old.former.pins / "listeners", pins / "listeners")
    os.link(old.former.pins / "pod", pins / "pod")
    old.upgrade()
    old.now.set_mode(lib.MODE_STRICT)
    assert (old.now.verify(), old.now.listeners()) == (0, 7)
    # All is done but taking the old pins away.
    old.former.pins.mkdir(parents=True)
    for name in ("listeners", "pod", "link"):
        os.link(pins / name, old.former.pins / name)
    old.upgrade()
    assert (old.now.verify(), old.now.listeners()) == (0, 7)
    assert not old.former.pins.exists()
    client = connect(link.pod_path, link.far4, FAR)
    closing(engine, client, engine.outbound.accept()[0])


def test_native_flows_go_on(tmp_path: Path, family: int, closing: Close) -> None:
    """Of v2: a vouched flow that is open is not cut, and its allowance still holds; new flows go from door to door."""
    with Nodes(tmp_path, {"client": 0, "near": 0}, engines=(False, False)) as nodes:
        pods = {name: Old(nodes[name].pair, tmp_path, "v2", door=True) for name in ("client", "near")}
        try:
            node = pods["client"].former.pins.parent / "node"
            for old in pods.values():
                old.former.mode(lib.MODE_STRICT)
                closing(StandIn(old.former))
            near = nodes["near"].address(family)
            tuple_ = packed(nodes["client"].address(family)) + packed(near) + struct.pack("HH", 0, PORT)
            verdicts = Map(bytes(pods["client"].former.pins / "verdicts"))
            with Map(bytes(node / "slots")) as slots, verdicts:
                slots.update(struct.pack("I", 5), struct.pack("II", 1, 1).ljust(ffi.sizeof("struct vouch_slot"), b"\0"))
                verdicts.update(tuple_, struct.pack("IIQ", 5, 1, 2**63))
            application = listen(nodes["near"].path, near, PORT)
            open_ = connect(nodes["client"].path, near, PORT)
            served, _ = application.accept()
            closing(application, open_, served)
            talk(open_, served)
            for old in pods.values():
                old.upgrade()
                talk(open_, served)
            for old in pods.values():
                old.now.set_mode(lib.MODE_STRICT)
                assert old.now.verify() == 0
                talk(open_, served)
            assert not node.exists()
            # As an engine of now says for whom it allows.
            bpftool = shutil.which("bpftool") or "/usr/sbin/bpftool"
            fates = pods["near"].now.pins.decode() + "/fates"
            instance = json.loads(tool(bpftool, "-j", "map", "show", "pinned", fates))["id"]
            with Map(os.path.dirname(pods["near"].now.pins) + b"/node/slots") as slots:
                slot = slots.lookup(struct.pack("I", 5), int(ffi.sizeof("struct vouch_slot")))
                at = int(ffi.offsetof("struct vouch_slot", "target"))
                slots.update(struct.pack("I", 5), slot[:at] + struct.pack("I", instance) + slot[at + 4 :])
            counted = pods["near"].now.counters()
            new = connect(nodes["client"].path, near, PORT)
            new_served, _ = application.accept()
            closing(new, new_served)
            talk(new, new_served)
            grown = pods["near"].now.counters()
            assert grown["to_application_vouched"] == counted["to_application_vouched"] + 1
            assert grown["by_door"] > counted["by_door"]
            talk(open_, served)
        finally:
            for old in pods.values():
                with suppress(CaptureError):
                    old.now.detach()
                old.former.remove()


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_an_agent_after_one_of_a_layout_before(node: Node, tmp_path: Path, layout: str) -> None:
    """The pods are captured all the time; they are served again, natively too, and nothing of before is left."""
    node.same_node = "native"
    node.cluster.label("shop", "ambient")
    node.pods = {name: node.pod(name) for name in ("web", "api")}
    records = Records(tmp_path / "run" / "pods")
    for sandbox, pod in node.pods.values():
        pair = Pair(Path(sandbox.path).name, "", sandbox.v4, sandbox.v6, "", "")
        Former(node.bpf_dir, pod.uid, pair, tmp_path, layout).mode(lib.MODE_STRICT)
        records.save(record(sandbox, pod))

    async def work() -> None:
        (web, web_pod), (api, api_pod) = node.pods["web"], node.pods["api"]
        async with echo(api, PORT) as seen:
            for address in (api.v4, api.v6):
                with pytest.raises((OSError, TimeoutError)):
                    await Client.open(web, address, PORT, seconds=1)
            assert seen == []
            node.start_engine()
            async with node.running_agent() as agent:
                for pod in (web_pod, api_pod):
                    assert agent.residents[pod.uid].capture is Mode.STRICT
                    await node.enrolled(pod, Mode.STRICT)
                assert os.listdir(node.bpf_dir) == ["v3"]
                for address in (api.v4, api.v6):
                    await allow(node, web, api, api_pod, address)
                await (await native(node, web, api, api_pod, api.v4)).close()
                for _, pod in node.pods.values():
                    node.cluster.label("shop", "")
                    await node.released(pod)
            assert os.listdir(node.bpf_dir / "v3") == []

    run(work())


def record(sandbox: Sandbox, pod: Pod) -> Record:
    netns = open_path(sandbox.path)
    try:
        return Record(
            uid=pod.uid,
            namespace=pod.namespace,
            name=pod.name,
            service_account=pod.service_account,
            container="",
            interface="eth0",
            netns_path=sandbox.path,
            netns_ino=netns.ino,
            netns_cookie=netns.cookie,
            addresses=(sandbox.v4, sandbox.v6),
        )
    finally:
        netns.close()
