"""The engine's end of the channel: a listening SEQPACKET socket, and one connection with a controller.

What a packet holds is wire/channel.py's business; here are the socket, who may connect, and the file descriptors that
ride along. A received fd belongs to the `Request` it came with, which closes it. Nothing waits for a controller for
longer than SEND_S.
"""

import array
import errno
import fcntl
import os
import select
import socket
import stat
import struct
from dataclasses import dataclass, field

from sidestep.wire import channel

SEND_S = 10.0
BACKLOG = 8
_UCRED = struct.Struct("3i")
_FD = struct.calcsize("i")


class ChannelError(Exception):
    """The socket cannot be served; the message says why and what to do."""


class Disconnected(Exception):
    """The controller is gone, or sent what no controller sends."""


@dataclass(slots=True)
class Request:
    """A command and its fds, which it closes at the end of `with`. `error`: the header is good, the rest is not."""

    kind: int
    sequence: int
    packet: channel.Packet | None
    error: str = ""
    fds: list[int] = field(default_factory=list)

    def __enter__(self) -> "Request":
        return self

    def __exit__(self, *unused: object) -> None:
        close_all(self.fds)


def close_all(fds: list[int]) -> None:
    """Closes each and empties the list."""
    while fds:
        os.close(fds.pop())


def listen(path: str) -> socket.socket:
    """The listening socket: 0600 in a directory that is 0700. A socket file that nobody serves is replaced.

    Raises ChannelError.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ChannelError(
            f"{folder} must belong to this user with mode 0700, for whoever reaches the socket commands the engine"
        )
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two engines that start at once; held for a few system calls
        _remove_dead(path)
        old = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(old)
        listener.listen(BACKLOG)
    except OSError as err:
        listener.close()
        raise ChannelError(f"cannot listen on {path}: {err.strerror}") from None
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(lock)
    return listener


def _remove_dead(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ChannelError(f"{path} exists and is not a socket: remove it, or name another --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise ChannelError(f"another engine serves {path}: stop it first, or name another --socket")
    os.unlink(path)


def accept(listener: socket.socket) -> "Connection | None":
    """The next connection of root, or None."""
    try:
        peer, _ = listener.accept()
    except OSError:
        return None
    peer.set_inheritable(False)
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != 0:
        peer.close()
        return None
    peer.settimeout(SEND_S)
    return Connection(peer)


class Connection:
    """One controller. `greeted`: it said HELLO and a version was agreed on."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._buffer = bytearray(channel.PACKET_MAX + 1)
        self.greeted = False

    def fileno(self) -> int:
        """For poll()."""
        return self._peer.fileno()

    def close(self) -> None:
        """Ends it."""
        self._peer.close()

    def dead(self) -> bool:
        """Whether the other side has closed."""
        poll = select.poll()
        poll.register(self._peer, select.POLLRDHUP | select.POLLHUP)
        return any(events & (select.POLLHUP | select.POLLRDHUP | select.POLLERR) for _, events in poll.poll(0))

    def receive(self) -> Request:
        """One packet; call it when there is one. Raises Disconnected when it has no header that could be answered."""
        fds: list[int] = []
        size = 0
        try:
            size, ancillary, flags, _ = self._peer.recvmsg_into(
                [self._buffer], socket.CMSG_SPACE(channel.FDS_MAX * _FD), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                    fds.extend(received)
            if size == 0:
                raise Disconnected("closed")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Disconnected("a packet that is too long, or with too many file descriptors")
            return self._request(size, fds)
        except OSError as err:
            close_all(fds)
            raise Disconnected(err.strerror or str(err)) from None
        except BaseException:
            close_all(fds)
            raise
        finally:
            self._buffer[:size] = bytes(size)  # keys come this way

    def _request(self, size: int, fds: list[int]) -> Request:
        head = bytes(self._buffer[: channel.HEADER.size])
        if size < channel.HEADER.size or not head.startswith(channel.MAGIC):
            raise Disconnected("a packet without a header")
        _, version, kind, sequence, _ = channel.HEADER.unpack(head)
        error, packet = "", None
        if kind & channel.REPLY:
            raise Disconnected("a reply where a command was due")
        if version != channel.VERSION:
            error = f"version {version} of the channel is not known, {channel.VERSION} is"
        else:
            try:
                packet = channel.decode(bytes(self._buffer[:size]))
            except channel.PacketError as err:
                error = str(err)
        return Request(kind, sequence, packet, error, fds)

    def reply(self, kind: int, sequence: int, body: dict[str, object], fds: list[int]) -> None:
        """Answers; the fds stay the caller's. Raises Disconnected when the controller does not read."""
        packet = channel.encode(channel.REPLY | kind, sequence, body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._peer.sendmsg([packet], rights)
        except OSError as err:
            raise Disconnected(err.strerror or str(err)) from None
