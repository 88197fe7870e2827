"""Fuzzing of the engine's channel: changed packets against the real engine's process.

    python -m tests.harness.fuzz_channel --seconds 20 [--seed N]

Invariant: whatever a controller sends, the engine lives, answers the next controller's HELLO, and holds no more file
descriptors than before. Prints the seed; exit status 1 and the last packets in a file when the invariant broke.
"""

import argparse
import fcntl
import json
import os
import random
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from sidestep.wire import batch, channel
from tests.harness.engine import Client, EngineProcess

ROUND = 200
STRANGE: tuple[object, ...] = (None, True, -1, 0, 2**64, 1e308, "", "\0", "\ud800", "x" * 5000, [], [[]], {}, {"a": 1})


def bodies() -> list[tuple[int, dict[str, object]]]:
    """Commands as a controller sends them, harmless ones (nothing that ends the engine)."""
    uri = "spiffe://cluster.local/ns/shop/sa/web"
    pem = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUQ2x5\n-----END CERTIFICATE-----\n"
    return [
        (channel.HELLO, {"min": 1, "max": 1}),
        (channel.SETTINGS, {"network": "", "cluster_cidrs": ["10.0.0.0/8", "fd00::/8"], "same_node": "mtls"}),
        (
            channel.POD_ADD,
            {
                "uid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
                "namespace": "shop",
                "name": "web",
                "service_account": "web",
                "workload": "Kubernetes//Pod/shop/web",
                "addresses": ["10.0.0.1", "fd00::1"],
                "identity": uri,
                "netns_cookie": 7,
                "netns_ino": 8,
            },
        ),
        (channel.POD_MODE, {"uid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427", "mode": "draining"}),
        (channel.POD_DEL, {"uid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427"}),
        (channel.IDENTITY_SET, {"identity": uri, "key_pem": pem, "chain_pem": pem, "roots_pem": pem}),
        (channel.IDENTITY_DEL, {"identity": uri}),
        (channel.APPLY, {"size": 48}),
        (channel.METRICS, {}),
        (channel.DUMP, {"what": "workloads"}),
        (channel.POD_STATS, {"uid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427"}),
        (channel.AUTHZ, {"identity": uri, "source": "10.0.0.2:1", "destination": "[fd00::1]:80"}),
    ]


def packet(chance: random.Random) -> bytes:
    """A packet: real, with a strange value, with changed bytes, or cut."""
    kind, body = chance.choice(bodies())
    body = dict(body)
    how = chance.randrange(5)
    if how == 1 and body:
        body[chance.choice(list(body))] = chance.choice(STRANGE)
    text = repr(body).encode("utf-8", "surrogatepass") if how == 2 else None
    if text is None:
        text = json.dumps(body).encode()
    data = bytearray(
        channel.HEADER.pack(channel.MAGIC, channel.VERSION, kind, chance.randrange(2**32), len(text)) + text
    )
    if how == 3:
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if int.from_bytes(data[6:8], "little") == channel.SHUTDOWN:
            data[6] = channel.HELLO
    if how == 4:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def descriptors(chance: random.Random) -> list[int]:
    """None to five fds of several kinds; the caller closes them."""
    made = []
    for _ in range(chance.choice((0, 0, 1, 1, 3, 5))):
        kind = chance.randrange(4)
        if kind == 0:
            made.append(os.open("/dev/null", os.O_RDWR))
        elif kind == 1:
            made.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        else:
            fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
            data = bytearray(batch.encode([batch.Record(batch.Op.ADDRESS_DEL, "a", "1")]))
            if kind == 3:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            os.write(fd, data)
            made.append(fd)
            if chance.randrange(4):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, batch.SEALS)
    return made


def one_controller(engine: EngineProcess, chance: random.Random, sent: deque[bytes]) -> int:
    """One connection and some packets. Returns how many were answered."""
    answered = 0
    with engine.client(greet=chance.randrange(4) > 0) as client:
        for _ in range(chance.randint(1, 12)):
            fds = descriptors(chance)
            try:
                sent.append(packet(chance))
                client.send(sent[-1] or b"\0", fds)
                reply = client.receive()
            except (BrokenPipeError, ConnectionResetError):
                return answered
            finally:
                for fd in fds:
                    os.close(fd)
            if reply is None:
                return answered
            answered += 1
            for fd in reply[1]:
                os.close(fd)
    return answered


def check(engine: EngineProcess, before: list[str] | None) -> list[str]:
    """The invariant. Returns what the engine's fds refer to. Raises AssertionError."""
    assert engine.process.poll() is None, f"the engine ended with {engine.process.returncode}"
    with Client(engine.path) as client:
        client.call(channel.POD_DEL, {"uid": "nobody"})  # by then it has closed what came with the reply to HELLO
        folder = f"/proc/{engine.process.pid}/fd"
        now = sorted(os.readlink(f"{folder}/{fd}").split("[")[0] for fd in os.listdir(folder))
        for pod in client.hello["pods"]:
            client.call(channel.POD_DEL, {"uid": pod["uid"]})
    assert before is None or now == before, f"file descriptors {now}, there were {before}"
    log = engine.log.read_text(errors="replace")
    assert "failed: " not in log, log[-2000:]
    return now


def main() -> int:
    """Runs for the given time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--failed", type=Path, default=Path("build/fuzz-channel.failed"))
    args = parser.parse_args()
    chance, sent = random.Random(args.seed), deque[bytes](maxlen=40)
    rounds = answered = 0
    with tempfile.TemporaryDirectory() as folder, EngineProcess(Path(folder)) as engine:
        try:
            fds = check(engine, None)
            end = time.monotonic() + args.seconds
            while time.monotonic() < end:
                answered += one_controller(engine, chance, sent)
                rounds += 1
                if rounds % ROUND == 0:
                    check(engine, fds)
            check(engine, fds)
        except AssertionError as err:
            args.failed.write_text("\n".join(each.hex() for each in sent))
            print(
                f"fuzz_channel: seed {args.seed}, after {rounds} controllers: {err}; packets: {args.failed}",
                file=sys.stderr,
            )
            return 1
    print(f"fuzz_channel: seed {args.seed}, {rounds} controllers, {answered} answers")
    return 0 if answered > rounds / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
