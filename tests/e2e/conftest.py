"""Labs with the same world, with the mesh and without: every claim about the wire has its control. Those with the mesh
are two, with acceleration off and on; a test that asks for `mesh` runs in both, which stand side by side to the end.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness.lab import Lab, build_customers

BANNER = """
import socket, sys, threading
# A protocol in which the server speaks first, as SMTP and MySQL do.
listener = socket.create_server(("::", 2525), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
def serve(c):
    with c:
        c.sendall(b"220 banner-canary of a server that speaks first\\r\\n")
        c.sendall(b"250 " + c.recv(1000))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

POSTGRES = """
set -eu
bin=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)
"$bin/initdb" -D /data/pg -U world -A trust -E UTF8 --locale=C >/dev/null
echo "host all all 0.0.0.0/0 trust" >>/data/pg/pg_hba.conf
echo "host all all ::/0 trust" >>/data/pg/pg_hba.conf
exec "$bin/postgres" -D /data/pg -c listen_addresses='*' -c unix_socket_directories=/data -c fsync=off
"""


def pod(
    name: str, node: str, command: list[str], port: int = 0, namespace: str = "world", user: int = 0
) -> list[dict[str, Any]]:
    """A pod with a service account of its own and, with a port, a Service."""
    container: dict[str, Any] = {"name": "main", "image": "host", "command": command}
    if user:
        container["securityContext"] = {"runAsUser": user, "runAsGroup": user}
    if port:
        container["ports"] = [{"containerPort": port}]
        container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1}
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    metadata = {"name": name, "namespace": namespace}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**metadata, "labels": {"app": name}},
            "spec": {
                "nodeName": node,
                "serviceAccountName": name,
                "terminationGracePeriodSeconds": 1,
                "containers": [container],
                **({"volumes": [{"name": "data", "emptyDir": {}}]} if port else {}),
            },
        },
    ]
    if port:
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {
                    "selector": {"app": name},
                    "ipFamilyPolicy": "PreferDualStack",
                    "ports": [{"name": "tcp", "port": port, "targetPort": port}],
                },
            }
        )
    return objects


def world() -> list[dict[str, Any]]:
    """client and near on node1; server, banner, redis, web and db (PostgreSQL) on node2."""
    customers = str(build_customers())
    objects: list[dict[str, Any]] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "world"}}]
    objects += pod("client", "node1", ["sleep", "infinity"])
    objects += pod("near", "node1", [customers, "serve", "7000"], 7000)
    objects += pod("server", "node2", [customers, "serve", "7000"], 7000)
    objects += pod("banner", "node2", ["/usr/bin/python3", "-c", BANNER], 2525)
    redis = [
        "redis-server",
        "--port",
        "6379",
        "--bind",
        "*",
        "-::*",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        "/data",
    ]
    objects += pod("redis", "node2", redis, 6379)
    objects += pod("db", "node2", ["sh", "-c", POSTGRES], 5432, user=65534)
    objects += pod(
        "web", "node2", ["/usr/bin/python3", "-m", "http.server", "8080", "--bind", "::", "-d", "/usr/share/doc"], 8080
    )
    return objects


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world as one manifest."""
    path = tmp_path_factory.mktemp("world") / "world.yaml"
    path.write_text(yaml.safe_dump_all(world()))
    return path


def _lab(name: str, manifests: Path, plain: bool, *options: str) -> Iterator[Lab]:
    lab = Lab(f"{name}{os.getpid() % 10000}", plain=plain)
    try:
        lab.up(manifests, options=options)
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def direct(manifests: Path) -> Iterator[Lab]:
    """The lab with the mesh; namespace `world` is not labelled at the start."""
    yield from _lab("m", manifests, False, "--same-node", "direct")


@pytest.fixture(scope="session")
def native(manifests: Path) -> Iterator[Lab]:
    """The same with acceleration."""
    yield from _lab("n", manifests, False, "--same-node", "native")


@pytest.fixture(scope="session")
def mesh(request: pytest.FixtureRequest, same_node: str) -> Lab:
    """The lab with the mesh, with either setting."""
    lab: Lab = request.getfixturevalue(same_node)
    return lab


@pytest.fixture(scope="session")
def plain(manifests: Path) -> Iterator[Lab]:
    """The same lab without the mesh."""
    yield from _lab("p", manifests, plain=True)
