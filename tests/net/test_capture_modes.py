"""Any mode may follow any other, at any moment: who gets new connections, what happens to those that are open."""

import socket
from contextlib import ExitStack
from itertools import pairwise

import pytest

from sidestep._bpf import lib
from tests.harness.netns import Pair, connect, inside, listen, run
from tests.harness.stand_in import Capture, CaptureError, StandIn
from tests.net.test_bypass import mac, syn_frame
from tests.net.test_capture import eventually

OUT = -1
MODES = {"out": OUT, "strict": lib.MODE_STRICT, "lenient": lib.MODE_LENIENT, "draining": lib.MODE_DRAINING}
# Every ordered pair of the four, each mode after itself included.
ROUND = (
    "out strict strict lenient lenient draining draining out out lenient strict draining strict out draining lenient"
)
ROUND += " out"
Ends = tuple[socket.socket, socket.socket]


def alive(ends: Ends) -> None:
    for one, other in (ends, ends[::-1]):
        one.sendall(b"still there")
        assert other.recv(11) == b"still there"


class Ground:
    """A pod with an application, somebody outside, and perhaps capture with a stand-in for the engine."""

    def __init__(self, link: Pair, family: int, stack: ExitStack) -> None:
        self.link, self.family, self.stack = link, family, stack
        self.far = stack.enter_context(listen(link.outside_path, link.far(family), 80))
        self.application = stack.enter_context(listen(link.pod_path, link.pod_address(family), 8080))
        self.capture = Capture(link)
        self.engine: StandIn | None = None

    def change(self, mode: int) -> None:
        if mode == OUT:
            self.capture.detach()
            if self.engine:
                self.engine.close()
            self.engine = None
            return
        self.capture.prepare()
        if self.engine is None:
            self.engine = StandIn(self.capture)
        self.capture.set_mode(mode)
        assert self.capture.verify() == 0

    def new_connections(self, captured: bool) -> list[Ends]:
        """One out, one in, each to where the mode wants it."""
        outbound = self.engine.outbound if captured and self.engine else self.far
        inbound = self.engine.inbound if captured and self.engine else self.application
        made = []
        for path, address, port, listener in (
            (self.link.pod_path, self.link.far(self.family), 80, outbound),
            (self.link.outside_path, self.link.pod_address(self.family), 8080, inbound),
        ):
            client = self.stack.enter_context(connect(path, address, port))
            served, _ = listener.accept()
            self.stack.enter_context(served)
            served.settimeout(20)
            made.append((client, served))
        return made

    def engines_connection(self) -> Ends:
        """What the engine has opened towards the application, for somebody outside."""
        assert self.engine
        address = self.link.pod_address(self.family)
        made = self.stack.enter_context(self.engine.connect(address, 8080, (self.link.far(self.family), 0)))
        served = self.stack.enter_context(self.application.accept()[0])
        served.settimeout(20)
        return made, served


def test_the_round_has_every_pair() -> None:
    names = ROUND.split()
    assert len(set(pairwise(names))) == 16


def test_any_mode_after_any_other(link: Pair, family: int) -> None:
    native: list[Ends] = []
    held: list[Ends] = []
    with ExitStack() as stack:
        ground = Ground(link, family, stack)
        for name in ROUND.split():
            mode = MODES[name]
            ground.change(mode)
            # To strict while old connections are open is nobody's step but the agent's when none is left: they end.
            native = [] if mode == lib.MODE_STRICT else native
            held = [] if mode == OUT else held
            for ends in native + held:
                alive(ends)
            captured = mode in (lib.MODE_STRICT, lib.MODE_LENIENT)
            made = ground.new_connections(captured)
            (held if captured else native).extend(made)
            if mode != OUT:
                held.append(ground.engines_connection())
            for ends in made:
                alive(ends)
        ground.change(OUT)


def test_new_half_open_connections_do_not_delay_the_enrolment(capture: Capture, link: Pair, family: int) -> None:
    """Only those from before count: somebody outside who never completes a handshake cannot keep a pod out."""
    rules = "add table inet t; add chain inet t o { type filter hook output priority 0; };"
    run("nsenter", f"--net={link.outside_path}", "nft", rules + " add rule inet t o tcp flags & rst == rst drop")
    address = link.pod_address(family)
    application = listen(link.pod_path, address, 8080)
    header = b"".join(bytes.fromhex(mac(name).replace(":", "")) for name in (link.pod, link.outside))

    def send(port: int, flags: int, sequence: int) -> None:
        frame = syn_frame(link.far(family), port, address, 8080, header, flags, sequence)

        def out() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                raw.sendto(frame, ("eth0", 3))

        inside(link.outside_path, out)

    def half_open() -> int:
        shown = run("nsenter", f"--net={link.pod_path}", "ss", "-Htn", "state", "syn-recv")
        return len(shown.splitlines())

    send(5000, 2, 1)
    eventually("half open", lambda: half_open() == 1)
    engine = StandIn(capture)
    for attempt in range(3):
        with pytest.raises(CaptureError, match="1 half-open connections from before"):
            capture.set_mode(lib.MODE_LENIENT)
        send(6000 + attempt, 2, 1)
    eventually("new ones", lambda: half_open() == 4)
    send(5000, 4, 2)  # RST
    eventually("the old one has ended", lambda: half_open() == 3)
    capture.set_mode(lib.MODE_LENIENT)
    engine.close()
    application.close()


def test_what_the_kernel_still_delivers_for_the_engine_counts_as_held(
    strict: StandIn, capture: Capture, link: Pair, family: int
) -> None:
    """The engine has closed, the application has not read: the programs must stay until it has."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    assert capture.held() == 0
    engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
    served, _ = application.accept()
    engine.setblocking(False)
    sent = 0
    try:
        while True:
            sent += engine.send(b"x" * 65536)
    except BlockingIOError:
        pass
    engine.close()
    assert capture.held() == 1
    served.settimeout(20)
    got = 0
    while data := served.recv(1 << 20):
        got += len(data)
    assert got == sent
    served.close()
    eventually("delivered", lambda: capture.held() == 0)
    application.close()


def test_every_thing_that_capture_needs_is_probed() -> None:
    from sidestep._bpf import ffi

    name, error = ffi.new("const char **"), ffi.new("char[]", lib.CAPTURE_ERROR_LEN)
    said: list[str] = []
    while (result := lib.capture_probe(len(said), name, error)) != -34:
        assert result == 0, ffi.string(error)
        said.append(ffi.string(name[0]).decode())
    assert len(said) == 8
    assert "sk_lookup" in said
