"""What crosses the link between two enrolled pods, for five protocols, with the control that the check can fail."""

import secrets

import pytest

from sidestep.lab.link import Flow, tls_bytes, violations
from tests.harness.lab import Lab

SIZE = 100_000

# Each program prints the number of application bytes that it sent and received; {target} and {canary} are filled in.
HTTP = """
import http.client, sys
total = 0
for _ in range(5):
    c = http.client.HTTPConnection({target!r}, 8080, timeout=20)
    c.request("GET", "/?" + {canary!r}, headers={{"X-Canary": {canary!r}}})
    r = c.getresponse(); total += len({canary!r}) * 2 + len(r.read()); c.close()
print(total)
"""
REDIS = """
import socket
s = socket.create_connection(({target!r}, 6379), timeout=20)
value = ({canary!r} * 10000)[:{size}].encode()
s.sendall(b"*3\\r\\n$3\\r\\nSET\\r\\n$1\\r\\nk\\r\\n$%d\\r\\n%s\\r\\n" % (len(value), value))
assert s.recv(5) == b"+OK\\r\\n"
s.sendall(b"*2\\r\\n$3\\r\\nGET\\r\\n$1\\r\\nk\\r\\n")
f = s.makefile("rb"); f.readline(); assert f.read({size}) == value
print(2 * {size})
"""
BANNER = """
import socket
s = socket.create_connection(({target!r}, 2525), timeout=20)
assert s.recv(1000).startswith(b"220 banner-canary")
s.sendall({canary!r}.encode())
assert {canary!r}.encode() in s.recv(1000)
print(100)
"""
ECHO = """
import socket
s = socket.create_connection(({target!r}, 7000), timeout=20)
total = 0
for _ in range(100):
    s.sendall({canary!r}.encode()); got = b""
    while len(got) < len({canary!r}): got += s.recv(1000)
    assert got == {canary!r}.encode(); total += 2 * len(got)
print(total)
"""
POSTGRES = """
import psycopg2
db = psycopg2.connect(host={target!r}, user="world", dbname="postgres", connect_timeout=20, sslmode="disable")
c = db.cursor()
c.execute("SELECT repeat(%s, 2000)", ({canary!r},))
assert c.fetchone()[0] == {canary!r} * 2000
print(2001 * len({canary!r}))
"""
PROGRAMS = {"db": POSTGRES, "web": HTTP, "redis": REDIS, "banner": BANNER, "server": ECHO}


def talk(lab: Lab, family: int, canary: str) -> tuple[list[Flow], int]:
    """Speaks all five protocols across the link; returns the flows opened meanwhile and the application's bytes."""
    total = 0
    with lab.tap() as tap:
        for name, program in PROGRAMS.items():
            target = lab.address(f"world/{name}", family)
            text = program.format(target=target, canary=canary, size=SIZE)
            total += int(lab.exec("world/client", "/usr/bin/python3", "-c", text))
        flows = tap.flows(opened_only=True)
    pods = {lab.address(f"world/{name}", family) for name in [*PROGRAMS, "client"]}
    return [flow for flow in flows if {flow.source.address, flow.destination.address} <= pods], total


@pytest.mark.parametrize("family", [4, 6])
def test_between_enrolled_pods_nothing_but_tls(mesh: Lab, plain: Lab, family: int) -> None:
    canary = f"canary-{secrets.token_hex(12)}"
    mesh.enrol("world")
    flows, total = talk(mesh, family, canary)
    assert violations(flows, [canary.encode(), b"banner-canary"]) == []
    print(f"application bytes {total}, TLS bytes {tls_bytes(flows)}")
    assert tls_bytes(flows) >= total

    control, _ = talk(plain, family, canary)
    kinds = {violation.kind for violation in violations(control, [canary.encode(), b"banner-canary"])}
    assert kinds == {"clear-connection", "canary"}
    assert tls_bytes(control) == 0
