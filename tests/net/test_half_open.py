"""Connections that are half open while a pod is enrolled: SYN-ACKs are held back across that moment, both ways.

However such a connection ends, it ends as without the mesh: completed, reset, or timed out. Every case runs with the
enrolment and, as its control, without.
"""

import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sidestep._bpf import lib
from tests.harness.netns import Pair, inside, listen, run
from tests.harness.stand_in import Capture, CaptureError, StandIn

Close = Callable[..., None]
TCP_SYNCNT = 7
HOLD = (
    "table inet held {"
    " chain leaving { type filter hook output priority 0; tcp flags & (syn|ack) == syn|ack drop; };"
    " chain coming { type filter hook input priority 0; tcp flags & (syn|ack) == syn|ack drop; };"
    " }"
)


@contextmanager
def held(link: Pair) -> Iterator[Callable[[], None]]:
    """No SYN-ACK crosses, in either direction, until the function is called."""
    nft = ("nsenter", f"--net={link.outside_path}", "nft")
    run(*nft, HOLD)
    gone: list[bool] = []

    def let_go() -> None:
        if not gone:
            gone.append(True)
            run(*nft, "delete table inet held")

    try:
        yield let_go
    finally:
        let_go()


def start(path: str, address: str, port: int) -> socket.socket:
    """A connect that is under way; with its second SYN unanswered it gives up (3 s)."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        made.setblocking(False)
        assert made.connect_ex((address, port)) == errno.EINPROGRESS
        return made

    return inside(path, make)


def outcome(made: socket.socket) -> str:
    """How a connect ended."""
    waiting = select.poll()
    waiting.register(made, select.POLLOUT)
    assert waiting.poll(20_000), "a connect without an end"
    number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    made.settimeout(20)
    return errno.errorcode[number] if number else "established"


def accepted(listener: socket.socket, closing: Close) -> socket.socket | None:
    """The connection that has arrived, None where there is none."""
    listener.settimeout(0)
    try:
        made, _ = listener.accept()
    except BlockingIOError:
        return None
    made.settimeout(20)
    closing(made)
    return made


class Enrolment:
    """The agent's part: LENIENT is asked for until it is reached."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.done.is_set():
            try:
                self._capture.set_mode(lib.MODE_LENIENT)
                self.done.set()
            except CaptureError as error:
                if "half-open" not in str(error):
                    raise


def request_sockets(path: str) -> int:
    """Half-open connections that somebody there has answered."""
    return len(run("nsenter", f"--net={path}", "ss", "-Htan", "state", "syn-recv").splitlines())


@pytest.mark.parametrize("meshed", [True, False], ids=["enrolled", "plain"])
@pytest.mark.parametrize("ending", ["completed", "reset", "timed-out"])
def test_half_open_connections_end_as_without_the_mesh(
    capture: Capture, link: Pair, closing: Close, family: int, ending: str, meshed: bool
) -> None:
    run("nsenter", f"--net={link.pod_path}", "sysctl", "-qw", "net.ipv4.tcp_synack_retries=1")
    far = listen(link.outside_path, link.far(family), 80)
    application = listen(link.pod_path, link.pod_address(family), 8080)
    closing(far, application)
    if meshed:
        closing(StandIn(capture))
    with held(link) as let_go:
        going = start(link.pod_path, link.far(family), 80)
        coming = start(link.outside_path, link.pod_address(family), 8080)
        closing(going, coming)
        deadline = time.monotonic() + 20
        while not request_sockets(link.pod_path) or not request_sockets(link.outside_path):
            assert time.monotonic() < deadline, "the SYNs did not arrive"
        enrolment = Enrolment(capture) if meshed else None
        if enrolment is not None:
            assert not enrolment.done.wait(0.5), "the half-open connection was not waited for"
        if ending == "completed":
            let_go()
        elif ending == "reset":
            far.close()  # the next SYN is answered with a RST
            coming.close()  # and so is the next SYN-ACK: its client has given up
            let_go()
        ends = [outcome(going)] + ([outcome(coming)] if ending != "reset" else [])
        if enrolment is not None:
            assert enrolment.done.wait(20), "the enrolment did not come to its end"
    assert (
        ends
        == {
            "completed": ["established", "established"],
            "reset": ["ECONNREFUSED"],
            "timed-out": ["ETIMEDOUT", "ETIMEDOUT"],
        }[ending]
    )
    served = accepted(application, closing)
    if ending != "completed":
        deadline = time.monotonic() + 20
        while request_sockets(link.pod_path):
            assert time.monotonic() < deadline, "a half-open connection stays"
        assert served is None
        assert accepted(application, closing) is None
        return
    met = accepted(far, closing)
    assert served is not None
    assert met is not None
    for one, other in ((going, met), (coming, served)):
        one.sendall(b"after all")
        assert other.recv(100) == b"after all"
        other.sendall(b"yes")
        assert one.recv(100) == b"yes"
