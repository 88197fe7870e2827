"""The real engine as a process of its own, and a small synchronous controller: commands out, replies in.

with EngineProcess(tmp_path) as engine, engine.client() as client:
    client.call(channel.POD_STATS, {"uid": uid})
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestep.wire import batch, channel
from tests.harness import sanitized

START_S = 20.0
CALL_S = 60.0
SUPERVISE = Path(__file__).resolve().parents[2] / "agent/sidestep/bin/supervise"


class CallError(Exception):
    """The engine answered that it did not do it; the text is its own."""


class Client:
    """One connection with the engine. Says HELLO unless told not to; `hello` and `versions` hold what was answered."""

    def __init__(self, path: Path, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(CALL_S)
        self._sequence = 0
        self.hello: dict[str, Any] = {}
        self.versions: dict[tuple[str, str], str] = {}
        try:
            self.socket.connect(str(path))
            if greet:
                self.greet()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the engine serves on."""
        self.socket.close()

    def greet(self) -> dict[str, Any]:
        """HELLO. Returns the reply."""
        self.hello, text = self.read(channel.HELLO, {"min": 1, "max": channel.VERSION})
        self.versions = {}
        for line in text.decode().splitlines():
            kind, name, version = line.split(" ", 2)
            self.versions[kind, name] = version
        return self.hello

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """A packet as it is."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights)

    def receive(self) -> tuple[channel.Packet, list[int]] | None:
        """The next packet and its fds, or None when the engine has closed. The fds are the caller's."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(
                channel.PACKET_MAX, socket.CMSG_SPACE(channel.FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return None
        fds: list[int] = []
        for _, _, payload in ancillary:
            received = array.array("i")
            received.frombytes(payload)
            fds.extend(received)
        return (channel.decode(data), fds) if data else None

    def request(self, kind: int, body: Mapping[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """A command and its reply, whatever it says; the reply's fds are the caller's."""
        self._sequence += 1
        self.send(channel.encode(kind, self._sequence, body), fds)
        reply = self.receive()
        assert reply is not None, (
            f"the engine closed the connection instead of answering {channel.NAMES.get(kind, kind)}"
        )
        packet, received = reply
        assert (packet.kind, packet.sequence) == (channel.REPLY | kind, self._sequence)
        return dict(packet.body), received

    def call(self, kind: int, body: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """A command that answers without fds. Raises CallError."""
        reply, received = self.request(kind, body, fds)
        for fd in received:
            os.close(fd)
        if not reply["ok"]:
            raise CallError(reply["error"])
        return reply

    def read(self, kind: int, body: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """A command that answers with a memfd: (reply, what is in it). Raises CallError."""
        reply, received = self.request(kind, body)
        try:
            if not reply["ok"]:
                raise CallError(reply["error"])
            (fd,) = received
            return reply, os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            for fd in received:
                os.close(fd)

    def apply(self, records: Sequence[batch.Record], full: bool = False, whole: bool = True) -> dict[str, Any]:
        """APPLY. `whole`: the state is complete with it. Returns the reply."""
        with batch.Batch(full) as state:
            for record in records:
                state.add(record)
            fd, size = state.seal()
        try:
            return self.call(channel.APPLY, {"size": size, "whole": whole}, [fd])
        finally:
            os.close(fd)

    def metrics(self) -> str:
        """METRICS."""
        return self.read(channel.METRICS, {})[1].decode()

    def dump(self, what: str) -> list[dict[str, Any]]:
        """DUMP."""
        found: list[dict[str, Any]] = json.loads(self.read(channel.DUMP, {"what": what})[1])
        return found


class EngineProcess:
    """`sidestep engine` under a directory of the test; its log is `log`. `supervised`: through the supervisor."""

    def __init__(
        self,
        folder: Path,
        workers: int = 1,
        arguments: Sequence[str] = (),
        supervised: bool = False,
        netns: str | None = None,
    ) -> None:
        self.folder = folder / f"engine-{os.urandom(4).hex()}"
        self.folder.mkdir(mode=0o700)
        self.path = self.folder / "engine.sock"
        self.log = self.folder / "log"
        command = [sys.executable, *sanitized.host(), "engine", "--socket", str(self.path), "--workers", str(workers)]
        command += arguments
        if supervised:
            command = [str(SUPERVISE), *command]
        if netns is not None:
            command = ["nsenter", f"--net={netns}", "--", *command]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=sanitized.environment()
            )

    def __enter__(self) -> "EngineProcess":
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Until it listens."""
        end = time.monotonic() + START_S
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                if probe.connect_ex(str(self.path)) == 0:
                    return
            assert self.process.poll() is None, f"the engine ended: {self.log.read_text()}"
            assert time.monotonic() < end, f"the engine does not listen: {self.log.read_text()}"
            time.sleep(0.01)

    def client(self, greet: bool = True) -> Client:
        """A controller."""
        return Client(self.path, greet)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL after 20 s. Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the engine did not end: {self.log.read_text()}") from None
        sanitized.check(self.log.read_text(errors="replace"))
        return status


def opened(metrics: str, reporter: str) -> int:
    """Connections that a node has opened as "source" or "destination", over all labels."""
    start = f'istio_tcp_connections_opened_total{{reporter="{reporter}"'
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in metrics.splitlines() if line.startswith(start))
