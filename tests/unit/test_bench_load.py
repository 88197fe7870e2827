"""What the benchmark reads of the programs that do the work, and the programs themselves on the loopback interface."""

import itertools
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from tests.bench.load import BODY, LoadError, Sample, build, compiled, parse_pgbench, parse_wrk
from tests.bench.load import sample as read_sample
from tests.bench.machine import Cpu
from tests.bench.peer import read
from tests.bench.rows import REAL, Row
from tests.bench.targets import link_wrong

WRK = """\
Running 2s test @ http://10.0.0.1:7180/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   215.57us  334.10us   9.87ms   97.27%
    Req/Sec    82.52k    10.42k   99.77k    80.00%
  Latency Distribution
     50%  172.00us
     75%  209.00us
     90%  270.00us
     99%    1.50ms
  164285 requests in 2.00s, 191.45MB read
Requests/sec:  82111.27
Transfer/sec:     95.69MB
"""
PGBENCH = """\
pgbench (15.18 (Debian 15.18-0+deb12u1))
number of transactions actually processed: 4
number of failed transactions: 0 (0.000%)
latency average = 0.150 ms
tps = 26543.123456 (without initial connection time)
"""


def test_wrk() -> None:
    assert parse_wrk(REAL[0], WRK, Cpu(164285, 0, 0)) == Sample(
        82111.27, 172_000, 1_500_000, Cpu(1, 0, 0), 164285, 164285 * BODY
    )


@pytest.mark.parametrize(
    "text",
    [
        WRK + "  Non-2xx or 3xx responses: 3\n",
        WRK + "  Socket errors: connect 0, read 3, write 0, timeout 0\n",
        WRK.replace("164285 requests", "0 requests"),
        "unable to connect",
    ],
)
def test_wrk_with_errors(text: str) -> None:
    with pytest.raises(LoadError):
        parse_wrk(REAL[0], text, Cpu(1, 0, 0))


def test_pgbench() -> None:
    log = "".join(f"0 {number} {took} 0 1700000000 1\n" for number, took in enumerate((100, 300, 200, 9000)))
    found = parse_pgbench(REAL[1], PGBENCH, log, Cpu(4, 0, 0))
    assert (found.rate, found.p50_ns, found.p99_ns, found.total_ops) == (26543.123456, 200_000, 300_000, 4)
    for broken in (
        PGBENCH.replace("failed transactions: 0", "failed transactions: 1"),
        "",
        PGBENCH.replace("4\n", "0\n"),
    ):
        with pytest.raises(LoadError):
            parse_pgbench(REAL[1], broken, log, Cpu(4, 0, 0))


@pytest.mark.parametrize(("ops", "saturated"), [(990, False), (960, True)])
def test_an_open_loop_that_does_not_keep_up_is_saturated(ops: int, saturated: bool) -> None:
    said = {"seconds": 1.0, "ops": ops, "bytes": 1, "p50_ns": 1, "p99_ns": 1, "total_ops": ops, "total_bytes": 1}
    assert read_sample(Row("", ("open", "1000", "64", "16")), said, Cpu(1, 0, 0)).saturated is saturated
    assert not read_sample(Row("", ("rr", "64", "16")), said, Cpu(1, 0, 0)).saturated


@pytest.mark.parametrize(
    ("kind", "place", "crossed", "wrong"),
    [
        ("rr", "across", 200, False),
        ("rr", "across", 199, True),
        ("bulk", "across", 100, False),
        ("bulk", "across", 99, True),
        ("rr", "local", 1_000_000, False),
        ("rr", "local", 1_000_101, True),
    ],
)
def test_the_link_between_the_nodes_is_the_witness(kind: str, place: str, crossed: int, wrong: bool) -> None:
    run = Sample(1, 1, 1, Cpu(), 1, 100)
    assert bool(link_wrong(Row("", (kind, "1")), place, run, crossed)) is wrong


def test_the_contract_of_a_peer() -> None:
    said = ["version any 1.0", "to across 7100 127.0.0.1 15001", "skip local", "ready", "not read any more"]
    assert read(iter(said)) == ({("across", 7100): ("127.0.0.1", 15001)}, ("across",), "any 1.0")
    for wrong in (["hello"], ["to moon 7100 a 1", "ready"], ["to across 99 a 1", "ready"], ["skip local"]):
        with pytest.raises(LoadError):
            read(iter(wrong))


# -- the programs ------------------------------------------------------------------------------------------------------
@contextmanager
def program(*words: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """One that goes on, and the line that it says when it is ready."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def server() -> Iterator[tuple["subprocess.Popen[str]", int]]:
    port = free_port()
    with program(str(build()), "serve", str(port)) as (process, line):
        assert line == "listening\n"
        yield process, port


def client(*words: str) -> dict[str, Any]:
    done = subprocess.run([str(build()), *words], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("rate", ["200", "3000000"])
def test_an_open_loop_counts_everything_that_was_due(rate: str) -> None:
    # Due at k / rate for a tenth of warm-up and the time itself: as many, whatever the machine could carry.
    with server() as (_, port):
        found = client("open", rate, "64", "4", "127.0.0.1", str(port), "0.5")
    assert found["errors"] == 0, found["error"]
    assert found["total_ops"] + found["unsent"] == int(float(rate) * 0.55)
    if rate == "3000000":  # nothing carries that: what was not sent must show in the latencies, all of them
        assert found["unsent"] > 0
        assert found["p99_ns"] > 10_000_000


def test_dialling_counts_everything_that_was_due() -> None:
    with server() as (_, port):
        found = client("dial", "200", "127.0.0.1", str(port), "0.5")
    assert found["errors"] == 0, found["error"]
    assert found["total_ops"] + found["unsent"] == 110


def test_dialling_sees_a_listener_that_stood_still() -> None:
    # After the 20th it accepts nobody for 0.3 s; they are dialled all the same, and each counts from when it was due.
    def answer(listener: socket.socket) -> None:
        for number in range(110):
            with listener.accept()[0] as accepted:
                accepted.settimeout(20)
                accepted.recv(72, socket.MSG_WAITALL)
                accepted.sendall(bytes((i * 131 + (i >> 8) * 17 + 7) & 255 for i in range(64)))
            if number == 20:
                time.sleep(0.3)

    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        found = client("dial", "100", "127.0.0.1", str(listener.getsockname()[1]), "1")
        thread.join()
    assert (found["errors"], found["unsent"]) == (0, 0), found["error"]
    assert found["max_ns"] > 200_000_000


def test_an_open_loop_sees_a_server_that_stood_still() -> None:
    # For 0.3 of 1 s: three tenths of the requests are due while nobody answers. A closed loop would see one slow one.
    def answer(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(20)
            accepted.recv(8, socket.MSG_WAITALL)
            for number in itertools.count():
                message = accepted.recv(64, socket.MSG_WAITALL)
                if not message:
                    return
                if number == 100:
                    time.sleep(0.3)
                accepted.sendall(message)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        found = client("open", "500", "64", "1", "127.0.0.1", str(listener.getsockname()[1]), "1")
        thread.join()
    assert found["errors"] == 0, found["error"]
    assert found["p99_ns"] > 200_000_000


def test_connections_that_are_held_are_open_at_once() -> None:
    with server() as (_, port):
        with program(str(build()), "hold", "300", "127.0.0.1", str(port), "30") as (process, line):
            assert line == "open\n"
            assert len(os.listdir(f"/proc/{process.pid}/fd")) >= 300


def received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except ConnectionResetError:
        return b""


@contextmanager
def relay(to: int) -> Iterator[tuple[int, bytearray]]:
    """A witness between two ends: passes connections on, and keeps what the side sends that opened them."""
    seen = bytearray()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        wake = socket.socketpair()
        for each in wake:
            stack.callback(each.close)

        def run() -> None:
            with ExitStack() as open_:
                onward: dict[socket.socket, socket.socket] = {}
                opened: set[socket.socket] = set()
                while wake[1] not in (ready := select.select([listener, wake[1], *onward], [], [])[0]):
                    for each in ready:
                        if each is listener:
                            near = open_.enter_context(listener.accept()[0])
                            far = open_.enter_context(socket.create_connection(("127.0.0.1", to)))
                            opened.add(near)
                            onward |= {near: far, far: near}
                        elif data := received(each):
                            seen.extend(data if each in opened else b"")
                            with suppress(OSError):  # an end that is killed at the test's end
                                onward[each].sendall(data)
                        else:
                            onward.pop(each)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            wake[0].send(b"x")
            thread.join()


def test_the_floor_seals_and_counts() -> None:
    far, near = free_port(), free_port()
    floor = str(compiled("floor", "-lcrypto", "-lpthread"))
    with ExitStack() as stack:
        _, port = stack.enter_context(server())
        far_end, line = stack.enter_context(program(floor, "out", "127.0.0.1", str(far), "127.0.0.1", str(port)))
        assert line.startswith("ready OpenSSL 3")
        witness, seen = stack.enter_context(relay(far))
        _, line = stack.enter_context(program(floor, "in", "127.0.0.1", str(near), "127.0.0.1", str(witness), "2"))
        assert line.startswith("ready")
        assert client("rr", "20000", "3", "127.0.0.1", str(near), "0.2")["errors"] == 0
        assert client("crr", "8", "127.0.0.1", str(near), "0.2")["errors"] == 0
        with socket.create_connection(("127.0.0.1", near)) as sent:
            sent.sendall(b"r\0\0\0\0\0\0\x1a" + b"this is to be read nowhere")
            sent.settimeout(20)
            assert sent.recv(26, socket.MSG_WAITALL) == b"this is to be read nowhere"
        assert len(seen) > 20000
        assert b"to be read" not in seen
        assert far_end.stdin is not None
        assert far_end.stdout is not None
        far_end.stdin.write("\n")
        far_end.stdin.flush()
        counted = json.loads(far_end.stdout.readline())
        assert counted["flows"] >= 5
        assert counted["records"] >= counted["flows"]
