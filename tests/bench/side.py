"""The labs of the benchmark: their pods, and what a measurement needs of a lab that is up.

On node1 ten pods: the client, a server for the paths that stay on the node, eight that sleep; on node2 the other
server. A server is three: the load's own, nginx and PostgreSQL.
"""

import contextlib
import http.client
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sidestep.cli.nodes import find
from tests.bench.load import BODY, LoadError, build, pg_bin
from tests.bench.rows import HTTP_PORT, LOAD_PORT, POSTGRES_PORT
from tests.harness.lab import LABEL, Lab, eventually
from tests.harness.netns import inside, run

METRICS = 15020
SLEEPERS = 8
SERVERS = {"across": "server", "local": "near"}

_NGINX = f"""\
daemon off;
worker_processes 1;
pid /data/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path /data/body; proxy_temp_path /data/proxy; fastcgi_temp_path /data/fastcgi;
  uwsgi_temp_path /data/uwsgi; scgi_temp_path /data/scgi;
  keepalive_requests 1000000000;
  tcp_nodelay on;
  server {{
    listen {HTTP_PORT}; listen [::]:{HTTP_PORT};
    location / {{ return 200 "{"x" * BODY}"; }}
  }}
}}
"""
_POSTGRES = f"""\
set -eu
bin=$1
"$bin/initdb" -D /data/pg -U bench -A trust -E UTF8 --locale=C >/dev/null
echo "host all all 0.0.0.0/0 trust" >>/data/pg/pg_hba.conf
echo "host all all ::/0 trust" >>/data/pg/pg_hba.conf
printf "port = {POSTGRES_PORT}\\nunix_socket_directories = '/data'\\nmax_connections = 50\\n" >>/data/pg/postgresql.conf
printf "fsync = off\\nshared_buffers = 32MB\\nautovacuum = off\\nlog_checkpoints = off\\n" >>/data/pg/postgresql.conf
"$bin/pg_ctl" -D /data/pg -w -o "-c listen_addresses=''" start >/dev/null
"$bin/createdb" -h /data -p {POSTGRES_PORT} -U bench bench
"$bin/pgbench" -h /data -p {POSTGRES_PORT} -U bench -i -q -s 1 bench >/dev/null 2>&1
"$bin/pg_ctl" -D /data/pg -w stop >/dev/null
exec "$bin/postgres" -D /data/pg -c listen_addresses='*'
"""


def pod(name: str, node: str, containers: Sequence[dict[str, Any]], volumes: Sequence[dict[str, Any]] = ()) -> Any:
    """A pod of namespace bench with a service account of its own name: two objects."""
    metadata = {"name": name, "namespace": "bench"}
    spec = {"nodeName": node, "serviceAccountName": name, "terminationGracePeriodSeconds": 1}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {**spec, "containers": list(containers), "volumes": list(volumes)},
        },
    ]


def sleeper(name: str, node: str = "node1") -> Any:
    """A pod that does nothing; a load may be run in it."""
    return pod(name, node, [{"name": "main", "image": "host", "command": ["sleep", "infinity"]}])


def namespace(mode: str) -> dict[str, Any]:
    """Namespace bench, labelled `mode`. A lab without the mesh does not care for the label."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench", "labels": {LABEL: mode}}}


def _port_open(port: int) -> dict[str, Any]:
    return {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 60}


def _server(name: str, node: str) -> Any:
    mounts = [{"name": "data", "mountPath": "/data"}, {"name": "programs", "mountPath": "/opt/bench"}]
    shared: dict[str, Any] = {"image": "host", "volumeMounts": mounts}
    containers = [
        {"name": "load", "image": "host", "command": [str(build()), "serve", str(LOAD_PORT)]},
        {
            "name": "nginx",
            "command": ["/usr/sbin/nginx", "-c", "/opt/bench/nginx.conf", "-p", "/data"],
            "readinessProbe": _port_open(HTTP_PORT),
            **shared,
        },
        {
            "name": "postgres",
            "command": ["sh", "/opt/bench/start-postgres", str(pg_bin())],
            "readinessProbe": _port_open(POSTGRES_PORT),
            "securityContext": {"runAsUser": 65534, "runAsGroup": 65534},
            **shared,
        },
    ]
    return pod(
        name,
        node,
        containers,
        [{"name": "data", "emptyDir": {}}, {"name": "programs", "configMap": {"name": "programs"}}],
    )


def manifests(mode: str) -> list[dict[str, Any]]:
    """Everything that a lab of the benchmark starts with."""
    programs = {"nginx.conf": _NGINX, "start-postgres": _POSTGRES}
    objects = [
        namespace(mode),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "programs", "namespace": "bench"},
            "data": programs,
        },
        *sleeper("client"),
        *_server("server", "node2"),
        *_server("near", "node1"),
    ]
    for number in range(SLEEPERS):
        objects += sleeper(f"sleeper{number}")
    return objects


class Side:
    """A lab that is up. `pods`: name -> its address of IPv4 and the path of its network namespace."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        status = lab.status()
        self.nodes = {node["name"]: node for node in status["nodes"]}
        self.addresses: dict[str, str] = {}
        self.netns: dict[str, str] = {}
        for item in lab.pods("bench"):
            name = item["metadata"]["name"]
            state = Path(self.nodes[item["spec"]["nodeName"]]["run_dir"]).parent
            self.addresses[name] = item["status"]["podIPs"][0]["ip"]
            self.netns[name] = str(state / "netns" / item["metadata"]["uid"])
            run(*self.enter(name), "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")

    def enter(self, pod: str) -> list[str]:
        """The command that runs another one in a pod's network namespace."""
        return ["nsenter", f"--net={self.netns[pod]}", "--"]

    def link_bytes(self) -> int:
        """Both directions of node1's link, so far."""
        return inside(self.nodes["node1"]["netns"], self._link_bytes)

    def connections(self) -> tuple[float, float]:
        """Connections with mutual TLS and connections that stayed on the node, as both nodes' engines count them."""
        texts = [inside(node["netns"], _metrics) for node in self.nodes.values()]
        return (
            sum(_sum(text, "istio_tcp_connections_opened_total", 'security_policy="mutual_tls"') for text in texts),
            sum(_sum(text, "sidestep_same_node_connections_total", "") for text in texts),
        )

    def natives(self) -> tuple[float, float, float]:
        """Of node1: connections between its pods that its engine carried, SYNs that the pods' programs handed on
        natively, bytes that pods sent and received, each counted at both ends."""
        text = inside(self.nodes["node1"]["netns"], _metrics)
        handed = _sum(text, "sidestep_capture_packets_total", 'decision="to_application_vouched"')
        counted = sum(_sum(text, f"istio_tcp_{way}_bytes_total", "") for way in ("sent", "received"))
        return _sum(text, "sidestep_same_node_connections_total", ""), handed, counted / 2

    def _link_bytes(self) -> int:
        interface = self.nodes["node1"]["link"]["interface"]
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == interface:
                fields = rest.split()
                return int(fields[0]) + int(fields[8])
        raise LoadError(f"no {interface} on node1")

    def modes(self) -> set[str]:
        """How the pods are captured, as the agents say it: strict, lenient, draining, none."""
        return {
            each["mode"] for agent in find(self.lab.name) for each in agent.ask("/pods") if each["namespace"] == "bench"
        }

    def processes(self) -> dict[str, list[int]]:
        """Agent and engine of each node, the engine with its supervisor; none in a plain lab."""
        found = {}
        for name in ("agent", "engine"):
            for node, status in self.nodes.items():
                process = status["processes"].get(name)
                if process:
                    found[f"{name}, {node}"] = [process[key] for key in ("pid", "supervisor") if key in process]
        return found


def _metrics() -> str:
    connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=20)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200:
        raise LoadError(f"the agent's metrics: status {answer.status}")
    return text


def _sum(text: str, name: str, label: str) -> float:
    """A family's samples whose labels contain `label`, added up."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")) and label in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextlib.contextmanager
def lab(
    folder: Path,
    letter: str,
    objects: Sequence[dict[str, Any]],
    *,
    mesh: bool,
    enrol: bool = True,
    options: Sequence[str] = (),
) -> Iterator[Side]:
    """A lab with every pod ready; with `mesh` and `enrol` every pod enrolled. Its name is made from the letter;
    `options` go to `lab up`."""
    manifest = folder / f"{letter}.yaml"
    manifest.write_text(yaml.safe_dump_all(objects))
    made = Lab(f"b{letter}{os.getpid() % 10000}", plain=not mesh)
    kind = ["--agent-arg=--drain-quiet-s=0"] if mesh else ["--plain"]
    with contextlib.ExitStack() as stack:
        stack.callback(made.down)
        made.command("up", "--nodes", "2", *kind, *options, "-f", str(manifest), timeout=240)
        if mesh and enrol:
            pods = {item["metadata"]["name"] for item in made.pods("bench")}
            eventually("every pod enrolled", lambda: made.enrolled("bench") == pods)
        yield Side(made)
