"""docs/threat-model.md, the lines about capture: each attack with the program attached and, as a control, without.

From a process without capabilities, and from one with CAP_NET_RAW.

A check is a function that returns violations (frames that left the pod with the canary in a TCP segment). With the
program there are none; without it every attack that the kernel lets through has at least one.
"""

import json
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sidestep._bpf import lib
from tests.harness.netns import Pair, Sniffer, connect, inside, listen, run
from tests.harness.stand_in import Capture, StandIn, plain
from tests.net import attacker

SCRIPT = Path(__file__).with_name("attacker.py").read_text()
PORT = 80
# What an unprivileged process may do; everything else needs CAP_NET_RAW.
UNPRIVILEGED = ["plain", "bound-to-device", "fast-open", "ip-options"]
ONLY_6 = ["hop-by-hop", "routing", "destination-options", "unknown-extension", "many-extensions"]
# What has CAP_NET_RAW gets past every tc program by these; not promised, and stated so (docs/threat-model.md).
PASSES = ("qdisc-bypass", "af-xdp")


def mac(name: str) -> str:
    return str(json.loads(run("ip", "-n", name, "-j", "link", "show", "eth0"))[0]["address"])


def attack(link: Pair, name: str, family: int, canary: str, raw: bool) -> dict[str, object]:
    """Runs one attack inside the pod as user 65534, with CAP_NET_RAW or without."""
    parameters = {
        "pod": link.pod_address(family),
        "far": link.far(family),
        "port": PORT,
        "canary": canary,
        "mac": mac(link.outside),
        "own_mac": mac(link.pod),
    }
    keep = ["--inh-caps=-all,+net_raw", "--ambient-caps=-all,+net_raw", "--bounding-set=-all,+net_raw"]
    drop = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    said = run(
        *("nsenter", f"--net={link.pod_path}", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *(keep if raw else drop),
        *("/usr/bin/python3", "-c", SCRIPT, name, json.dumps(parameters)),
    )
    return dict(json.loads(said.strip().splitlines()[-1]))


def violations(link: Pair, name: str, family: int, raw: bool) -> tuple[dict[str, object], list[str]]:
    """What the attacker said, and the frames that left the pod with the canary in clear text."""
    canary = secrets.token_hex(12)
    with Sniffer(link.outside_path) as sniffer:
        said = attack(link, name, family, canary, raw)
        frames = sniffer.wait_for(b"end-" + canary[::-1].encode())
        # A second fragment begins in the middle of the canary's repetitions: any of them is one too many.
        found = [frame.hex() for frame in frames if canary.encode() in frame]
    return said, found


@pytest.fixture
def far_server(link: Pair, closing: Callable[..., None]) -> None:
    """Somebody outside who accepts: without the program a connection sends its data, in the SYN if it likes."""
    run("nsenter", f"--net={link.pod_path}", "sysctl", "-qw", "net.ipv4.tcp_fastopen=5")
    for where in ("all", "eth0"):  # or nobody would answer a SYN with a routing header
        run("nsenter", f"--net={link.outside_path}", "sysctl", "-qw", f"net.ipv6.conf.{where}.seg6_enabled=1")
    closing(*(listen(link.outside_path, link.far(family), PORT) for family in (4, 6)))


def cases() -> list[tuple[str, int, bool]]:
    found = []
    for name in attacker.ATTACKS:
        for family in (6,) if name in ONLY_6 else (4, 6):
            for raw in (True, False):
                found.append((name, family, raw))
    return found


@pytest.mark.parametrize("raw", [True, False], ids=["net_raw", "unprivileged"])
def test_no_attack_sends_clear_text(capture: Capture, link: Pair, far_server: None, raw: bool) -> None:
    """All attacks on one pod, first as a control without the program, then with it."""
    mine = [(name, family) for name, family, with_raw in cases() if with_raw is raw]
    outcomes: dict[tuple[str, int], str] = {}
    for name, family in mine:
        said, found = violations(link, name, family, raw)
        outcomes[name, family] = str(said.get("refused", "done"))
        if "refused" in said:
            assert found == [], (name, family)
        else:
            assert found, f"the control of {name}, IPv{family}: nothing was seen"
    if raw:
        assert [each for each, outcome in outcomes.items() if outcome != "done"] == []
    else:
        assert {name for (name, _), outcome in outcomes.items() if outcome == "done"} <= set(UNPRIVILEGED)
        assert outcomes["plain", 4] == "done"

    capture.set_mode(lib.MODE_STRICT)
    engine = StandIn(capture)
    sink = Sink(engine)
    try:
        leaked = {}
        for name, family in mine:
            said, found = violations(link, name, family, raw)
            if found:
                leaked[name, family] = found
            assert "refused" in said or outcomes[name, family] == "done", (name, family, said)
    finally:
        sink.close()
        engine.close()
    print("outcomes:", {f"{name}/{family}": outcome for (name, family), outcome in outcomes.items()})
    bypassed = {key for key in leaked if key[0] in PASSES}
    assert bypassed == ({(name, family) for name in PASSES for family in (4, 6)} if raw else set())
    assert {key: found for key, found in leaked.items() if key not in bypassed} == {}
    counters = capture.counters()
    if raw:
        for name in ("drop_fragment", "drop_extension", "drop_vlan", "turned"):
            assert counters[name] > 0, counters


class Sink:
    """Accepts what the engine's outbound listener gets, and reads it to its end."""

    def __init__(self, engine: StandIn) -> None:
        self._engine = engine
        self._stop = threading.Event()
        engine.outbound.settimeout(0.2)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                accepted, _ = self._engine.outbound.accept()
            except TimeoutError:
                continue
            with accepted:
                accepted.settimeout(5)
                try:
                    while accepted.recv(4096):
                        pass
                except OSError:
                    pass

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


PLANT = """
import socket, sys
frame, marks = bytes.fromhex(sys.argv[1]), [int(m) for m in sys.argv[2].split(",")]
for device in ("lo", "eth0"):
    for mark in marks:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(socket.SOL_SOCKET, 36, mark)
            raw.sendto(frame, (device, 3))
print("planted")
"""


def syn_frame(
    source: str,
    source_port: int,
    destination: str,
    port: int,
    header: bytes,
    flags: int = 2,
    sequence: int = 1,
    payload: bytes = b"",
    ack: int = 1,
) -> bytes:
    """A SYN (or what `flags` say) from anybody, as a frame; `header`: the two MACs."""
    attacker.P.update({"pod": source, "far": destination, "port": port, "canary": ""})
    body = attacker.segment(flags, payload, source_port, sequence, ack)
    kind = b"\x86\xdd" if ":" in source else b"\x08\x00"
    return header + kind + (attacker.ip6(body) if ":" in source else attacker.ip4(body))


def test_nobody_in_the_pod_can_plant_the_inbound_tag(strict: StandIn, link: Pair, family: int) -> None:
    """A SYN on lo with an outsider's source, with any mark: the outsider's own SYN still meets the engine."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    frame = syn_frame(link.far(family), 33333, link.pod_address(family), 8080, bytes(12))
    run(
        *("nsenter", f"--net={link.pod_path}", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *("--inh-caps=-all,+net_raw", "--ambient-caps=-all,+net_raw", "--bounding-set=-all,+net_raw"),
        *("/usr/bin/python3", "-c", PLANT, frame.hex(), f"0,{0x111},{0x539}"),
    )

    def outsider() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        made.settimeout(20)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((link.far(family), 33333))
        made.connect((link.pod_address(family), 8080))
        return made

    client = inside(link.outside_path, outsider)
    client.sendall(b"from outside")
    for _ in range(100):
        accepted, peer = strict.inbound.accept()
        with accepted:
            if plain(peer) == (link.far(family), 33333):
                assert accepted.recv(100) == b"from outside"
                break
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()
    client.close()
    application.close()


def test_the_engines_tag_is_what_lets_a_connect_through(strict: StandIn, link: Pair, family: int) -> None:
    """The control of the test above: with the storage that only the engine can write, the same connect arrives."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
    served, _ = application.accept()
    for each in (engine, served, application):
        each.close()


def test_binding_15008_first_wins_nothing(strict: StandIn, link: Pair, family: int) -> None:
    squatter = listen(link.pod_path, link.pod_address(family), 15008)
    for _ in range(3):
        client = connect(link.outside_path, link.pod_address(family), 15008)
        accepted, _ = strict.hbone.accept()
        accepted.close()
        client.close()
    squatter.settimeout(0)
    with pytest.raises(BlockingIOError):
        squatter.accept()
    squatter.close()


def test_without_the_program_the_squatter_has_15008(capture: Capture, link: Pair, family: int) -> None:
    """The control: the program is what keeps the port."""
    squatter = listen(link.pod_path, link.pod_address(family), 15008)
    client = connect(link.outside_path, link.pod_address(family), 15008)
    accepted, _ = squatter.accept()
    for each in (client, accepted, squatter):
        each.close()
