"""An HBONE peer that shares no code with the engine: Python's `ssl` and the `h2` package, as server and as client.

It may present any certificate. What it saw is in plain attributes: requests, bytes, errors.
"""

import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

from tests.harness.netns import inside
from tests.harness.pki import Leaf

PORT = 15008
DEADLINE_S = 15.0
EARLY = 0xED01  # docs/interfaces.md, HBONE
REFUSED = 0  # an answer: RST_STREAM, not processed


def context(leaf: Leaf, server: bool) -> ssl.SSLContext:
    """TLS 1.3, ALPN h2, certificates on both sides, chain checked, names not."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=leaf.roots)
    made.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pem"
        path.touch(0o600)
        path.write_text(leaf.key + leaf.chain)
        made.load_cert_chain(path)
    return made


@dataclass(slots=True)
class Request:
    """One CONNECT that reached the server."""

    headers: dict[str, str]
    peer: str  # address of the tunnel's client
    received: bytearray = field(default_factory=bytearray)
    ahead: bytes = b""  # what had come when it was answered
    ended: bool = False


class Server:
    """Listens on PORT of a pod's address and echoes what each stream brings. `status` other than 200 refuses.

    `answer` is asked about each request that has none yet, whenever something came: a status, REFUSED, or None for not
    yet. `early`: says that it takes bytes ahead of an answer.
    """

    def __init__(
        self,
        netns: str,
        address: str,
        leaf: Leaf,
        status: int = 200,
        *,
        early: bool = False,
        answer: Callable[[Request], int | None] | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self._early = early
        self._answer = answer or (lambda request: status)
        self._context = context(leaf, server=True)
        self._stop = threading.Event()

        def listen() -> socket.socket:
            made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, PORT))
            made.listen(64)
            made.settimeout(0.1)
            return made

        self._listener = inside(netns, listen)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                accepted, peer = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(accepted, peer[0]), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, accepted: socket.socket, peer: str) -> None:
        accepted.settimeout(DEADLINE_S)
        try:
            with self._context.wrap_socket(accepted, server_side=True) as tls:
                tls.settimeout(0.1)
                self._speak(tls, peer)
        except (OSError, h2.exceptions.ProtocolError) as error:
            self.errors.append(str(error))
        finally:
            accepted.close()

    def _speak(self, tls: ssl.SSLSocket, peer: str) -> None:
        h2c = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        h2c.initiate_connection()
        tls.sendall(h2c.data_to_send())
        if self._early:  # by hand: hyperframe writes the low byte of a setting's number only
            tls.sendall(struct.pack(">HBBBIHI", 0, 6, 4, 0, 0, EARLY, 1))
        streams: dict[int, Request] = {}
        waiting: dict[int, Request] = {}
        while not self._stop.is_set():
            try:
                data = tls.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            for event in h2c.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    request = Request({str(k): str(v) for k, v in event.headers or []}, peer)
                    streams[event.stream_id or 0] = waiting[event.stream_id or 0] = request
                    self.requests.append(request)
                elif isinstance(event, h2.events.DataReceived):
                    request = streams[event.stream_id or 0]
                    request.received += event.data or b""
                    h2c.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                    if event.stream_id not in waiting:
                        h2c.send_data(event.stream_id or 0, event.data or b"")
                elif isinstance(event, h2.events.StreamEnded):
                    streams[event.stream_id or 0].ended = True
                    if event.stream_id not in waiting:
                        h2c.end_stream(event.stream_id or 0)
                elif isinstance(event, h2.events.StreamReset):
                    waiting.pop(event.stream_id or 0, None)
            for stream, request in list(waiting.items()):
                status = self._answer(request)
                if status is not None:
                    del waiting[stream]
                    request.ahead = bytes(request.received)
                    self._respond(h2c, stream, status, request)
            tls.sendall(h2c.data_to_send())

    def _respond(self, h2c: h2.connection.H2Connection, stream: int, status: int, request: Request) -> None:
        if status == REFUSED:
            h2c.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        h2c.send_headers(stream, [(":status", str(status))], end_stream=status != 200)
        if status == 200:
            if request.ahead:
                h2c.send_data(stream, request.ahead)
            if request.ended:
                h2c.end_stream(stream)


class Refused(Exception):
    """The other side ended the tunnel or the stream; `status` is its answer to CONNECT, 0 when there was none."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def exchange(
    netns: str,
    to: str,
    leaf: Leaf,
    authority: str,
    data: bytes,
    *,
    method: str = "CONNECT",
    headers: tuple[tuple[str, str], ...] = (),
    ahead: bool = False,
    settings: dict[int, int] | None = None,
) -> bytes:
    """Opens a tunnel from a namespace, one stream, sends data and its end, returns what came back. Raises Refused.

    `ahead`: the data goes right behind the request. `settings` receives those of the other side.
    """

    def dial() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(DEADLINE_S)
        made.connect((to, PORT))
        return made

    try:
        with inside(netns, dial) as raw, context(leaf, server=False).wrap_socket(raw) as tls:
            return _exchange(tls, authority, data, method, headers, ahead, {} if settings is None else settings)
    except (OSError, h2.exceptions.ProtocolError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def _exchange(
    tls: ssl.SSLSocket,
    authority: str,
    data: bytes,
    method: str,
    headers: tuple[tuple[str, str], ...],
    ahead: bool,
    settings: dict[int, int],
) -> bytes:
    h2c = h2.connection.H2Connection(
        h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
    )
    h2c.initiate_connection()
    request = [(":method", method), (":authority", authority), *headers]
    if method != "CONNECT":
        request += [(":scheme", "https"), (":path", "/")]
    h2c.send_headers(1, request)
    if ahead:
        for at in range(0, len(data), 16384):  # within what holds before the other's SETTINGS
            h2c.send_data(1, data[at : at + 16384], end_stream=at + 16384 >= len(data))
    tls.sendall(h2c.data_to_send())
    back = bytearray()
    while True:
        chunk = tls.recv(65536)
        if not chunk:
            raise Refused("the tunnel ended")
        for event in h2c.receive_data(chunk):
            if isinstance(event, h2.events.ResponseReceived):
                status = int(dict(event.headers or [])[":status"])
                if status != 200:
                    raise Refused(f"status {status}", status)
                if not ahead:
                    h2c.send_data(1, data, end_stream=True)
            elif isinstance(event, h2.events.DataReceived):
                back += event.data or b""
                h2c.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            elif isinstance(event, h2.events.RemoteSettingsChanged):
                settings.update({int(code): what.new_value for code, what in event.changed_settings.items()})
            elif isinstance(event, h2.events.StreamReset):
                raise Refused(f"stream reset with {event.error_code}")
            elif isinstance(event, h2.events.ConnectionTerminated):
                raise Refused(f"GOAWAY {event.error_code}")
            elif isinstance(event, h2.events.StreamEnded):
                return bytes(back)
        tls.sendall(h2c.data_to_send())
