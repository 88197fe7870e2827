"""Certificates are replaced in a running lab: no connection fails, nothing is restarted.

Leaves that live half a minute are renewed again and again; the root is replaced by the steps of decision 0005. Between
the steps the test waits for what an operator waits for: that every agent's certificates have the bundle of
the step. The second step brings a third root along, for a bundle that changes renews all certificates at once: half a
life (12 h) is not waited for here.
"""

import base64
import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from sidestep.cli.nodes import Node, find
from sidestep.control import authority
from tests.e2e.conftest import pod
from tests.harness.authorities import with_intermediate
from tests.harness.lab import LABEL, Lab, eventually

SECRET = "/api/v1/namespaces/istio-system/secrets/sidestep-ca"
ECHO = """
import socket, threading
def serve(c):
    with c:
        while data := c.recv(100):
            c.sendall(data)
made = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
while True:
    threading.Thread(target=serve, args=(made.accept()[0],), daemon=True).start()
"""
# New connections without a pause, to each address in turn; one line for each that fails, and for each 50 that do not.
LOAD = """
import socket, sys
done = 0
while True:
    address = sys.argv[1 + done % (len(sys.argv) - 1)]
    try:
        with socket.create_connection((address, 8080), timeout=20) as c:
            c.sendall(b"hello")
            got = c.recv(100)
        if got != b"hello":
            print(f"failed {address}: {got!r}", flush=True)
    except OSError as error:
        print(f"failed {address}: {error}", flush=True)
    done += 1
    if done % 50 == 0:
        print("done", flush=True)
"""


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Lab]:
    """Three pods in the mesh on two nodes; a parameter is further arguments of `lab up`."""
    manifest = tmp_path / "pods.yaml"
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {LABEL: "ambient"}}}
    ]
    objects += pod("client", "node1", ["sleep", "infinity"], namespace="shop")
    for name, node in (("near", "node1"), ("far", "node2")):
        objects += pod(name, node, ["/usr/bin/python3", "-c", ECHO], 8080, namespace="shop")
    manifest.write_text(yaml.safe_dump_all(objects))
    made = Lab(f"t{os.getpid() % 10000}")
    try:
        made.up(manifest, options=getattr(request, "param", ()))
        eventually("shop enrolled", lambda: made.enrolled("shop") == {"client", "near", "far"})
        yield made
    finally:
        made.down()


class Load:
    """The client's connections, counted."""

    def __init__(self, lab: Lab) -> None:
        targets = [lab.address(f"shop/{name}", family) for name in ("far", "near") for family in (4, 6)]
        words = ("/usr/bin/python3", "-c", LOAD, *targets)
        self._process = lab.popen("shop/client", *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.done = 0
        self.failed: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("done"):
                self.done += 50
            else:
                self.failed.append(line.strip())

    def more(self) -> None:
        """Waits for some hundred more."""
        before = self.done
        eventually("connections", lambda: self.done >= before + 200)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._reader.join(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


def identities(lab: Lab) -> list[dict[str, Any]]:
    """Every identity of every node: how long its chain is, how many roots it has."""
    found = []
    for node in find(lab.name):
        for each in node.ask("/config_dump")["certificates"]:
            found.append({"chain": len(each["certChain"]), "roots": len(each["rootCerts"]), "of": each["identity"]})
    return found


def holds(node: Node, policy: str) -> bool:
    """Whether a node's engine has it."""
    return any(row["key"] == policy for row in node.ask("/policies"))


def serials(lab: Lab) -> dict[tuple[str, str], str]:
    """The serial number of every node's every certificate."""
    return {
        (node.path.as_posix(), row["identity"]): str(row["serial"])
        for node in find(lab.name)
        for row in node.ask("/certificates")
    }


SHORT = "--control-arg=--max-ttl-s=30"
DIRECT, NATIVE = "--same-node=direct", "--same-node=native"


@pytest.mark.parametrize("lab", [(SHORT, DIRECT), (SHORT, NATIVE)], indirect=True, ids=["direct", "native"])
def test_leaves_are_renewed_under_load(lab: Lab) -> None:
    """Three generations of every leaf, each as long as half its life: what was verified with the first has ended."""
    load = Load(lab)
    try:
        load.more()
        seen: dict[tuple[str, str], set[str]] = {each: set() for each in serials(lab)}

        def renewed() -> bool:
            for each, serial in serials(lab).items():
                seen[each].add(serial)
            return all(len(found) > 3 for found in seen.values())

        started = time.monotonic()
        eventually("three new leaves each", renewed, 180)
        load.more()
        assert load.failed == []
        ends = [row["not_after"] - time.time() for node in find(lab.name) for row in node.ask("/certificates")]
        assert len(seen) == 3 and all(0 < end < 31 for end in ends), ends
    finally:
        load.end()
        print(
            f"{time.monotonic() - started:.0f} s, {load.done} connections, {len(load.failed)} failed: {load.failed[:5]}"
        )


@pytest.mark.parametrize("lab", [(DIRECT,), (NATIVE,)], indirect=True, ids=["direct", "native"])
def test_a_root_is_replaced_under_load(lab: Lab) -> None:
    def encoded(files: dict[str, str]) -> dict[str, str]:
        return {name: base64.b64encode(files.get(name, "").encode()).decode() for name in authority.FILES}

    def put(files: dict[str, str]) -> None:
        lab.ask(lambda client: client.patch(SECRET, {"data": encoded(files)}))

    held = lab.ask(lambda client: client.get(SECRET))["data"]
    old = {name: base64.b64decode(held.get(name) or "").decode() for name in authority.FILES}
    new, third = with_intermediate().files(), authority.new("third.example", time.time()).roots_pem
    first, second = old["root-cert.pem"], new["root-cert.pem"]
    pids = {name: each["pid"] for name, each in lab.status()["processes"].items()}
    steps = [
        (old | {"root-cert.pem": first + second}, 1, 2),
        (new | {"root-cert.pem": first + second + third}, 3, 3),
        (new, 3, 1),
    ]
    load = Load(lab)
    try:
        load.more()
        for number, (files, chain, roots) in enumerate(steps, 1):
            started = time.monotonic()
            put(files)

            def taken(chain: int = chain, roots: int = roots) -> bool:
                found = identities(lab)
                return len(found) == 3 and all((each["chain"], each["roots"]) == (chain, roots) for each in found)

            eventually(f"step {number}: chains of {chain} and {roots} roots", taken)
            print(
                f"step {number}: {time.monotonic() - started:.1f} s until every agent had it, {load.done} connections"
            )
            load.more()
            assert load.failed == [], f"step {number}"
        assert load.failed == []
        assert {name: each["pid"] for name, each in lab.status()["processes"].items()} == pids

        # A new server, whose certificate is of the new issuer: the agents' streams come back, and bring what is new.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids["control"], signal.SIGKILL)

        def back() -> bool:
            pages = [node.ask("/status")["control"] for node in find(lab.name)]
            again = lab.status()["processes"]["control"]["pid"] not in (0, None, pids["control"])
            return again and all(page["connected"] and not page["error"] for page in pages)

        eventually("the streams are back", back)
        policy = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "late", "namespace": "shop"},
            "spec": {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nobody"]}}]}]},
        }
        path = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies"
        lab.ask(lambda client: client.create(path, policy))
        for node in find(lab.name):
            eventually("the policy came", functools.partial(holds, node, "shop/late"))
        load.more()
        assert load.failed == []
    finally:
        load.end()
        print(f"{load.done} connections, {len(load.failed)} failed: {load.failed[:5]}")
