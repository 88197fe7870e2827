"""In steady state a connection costs the engine no allocation, and no lock that two workers could meet at."""

import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from tests.harness import sanitized
from tests.harness.cluster import Nodes
from tests.harness.engine import EngineProcess, opened
from tests.harness.netns import connect, listen

PORT = 8080
WARM, COUNTED = 200, 400


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """steady.c, compiled."""
    library = tmp_path_factory.mktemp("steady") / "steady.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", library, Path(__file__).with_name("steady.c")], check=True)
    return library


def serve(listener: socket.socket, count: int) -> None:
    """Answers so many connections, one after the other."""
    for _ in range(count):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            assert connection.recv(64) == b"question"
            connection.sendall(b"answer")
            assert connection.recv(64) == b""


@pytest.mark.parametrize("way", ["across", "same node", "clear text in", "clear text out"])
def test_a_connection_costs_no_allocation_and_no_lock(
    tmp_path: Path, counter: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(
        sanitized, "environment", lambda: {**os.environ, "LD_PRELOAD": str(counter), "STEADY": str(tmp_path / "counts")}
    )

    def counts(engine: EngineProcess) -> tuple[int, int]:
        """What the threads of an engine have allocated and locked so far."""
        allocations, locks = struct.unpack("QQ", (tmp_path / f"counts.{engine.process.pid}").read_bytes())
        return allocations, locks

    pods = {"client": 0, "server": 1, "near": 0}
    with Nodes(tmp_path, pods, workers=2, cidrs=["192.0.2.0/24"]) as nodes:
        nodes.publish()
        outside = f"/run/netns/{nodes.router}"
        gateway = nodes["client"].address().rsplit(".", 1)[0] + ".1"
        source, target, address = {
            "across": (nodes["client"].path, nodes["server"].path, nodes["server"].address()),
            "same node": (nodes["client"].path, nodes["near"].path, nodes["near"].address()),
            "clear text in": (outside, nodes["server"].path, nodes["server"].address()),
            "clear text out": (nodes["client"].path, outside, gateway),
        }[way]

        def carried() -> int:
            return sum(
                opened(client.metrics(), reporter)
                for client in nodes.clients
                if client is not None
                for reporter in ("source", "destination")
            )

        def talk(count: int) -> None:
            server = threading.Thread(target=serve, args=(listener, count), daemon=True)
            server.start()
            for _ in range(count):
                with connect(source, address, PORT) as connection:
                    connection.sendall(b"question")
                    assert connection.recv(64) == b"answer"
            server.join(20)
            assert not server.is_alive()

        with listen(target, address, PORT) as listener:
            talk(WARM)
            engines = [engine for engine in nodes.engines if engine is not None]
            before, through = [counts(engine) for engine in engines], carried()
            talk(COUNTED)
            after = [counts(engine) for engine in engines]
        assert carried() - through >= COUNTED
        # It does count: pods were made, and TLS takes locks when a tunnel comes up.
        assert all(allocations > 0 and (locks > 0 or way != "across") for allocations, locks in before)
        for (allocations, locks), (allocations_then, locks_then) in zip(after, before, strict=True):
            print(f"{way}: {allocations - allocations_then} allocations, {locks - locks_then} locks")
            # Not one each: what is left are lists that grow, and what a worker does that has rested for a second.
            assert allocations - allocations_then < COUNTED // 2
            assert locks - locks_then < COUNTED // 2
