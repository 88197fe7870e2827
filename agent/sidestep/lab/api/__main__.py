"""`python -m sidestep.lab.api`: the lab's API server and controllers, until SIGTERM.

Writes DIR/kubeconfig (0600) with the administrator's token once it listens, and says so on stdout in one line that
begins with `ready`. All objects are in memory: they go with the process.
"""

import argparse
import asyncio
import base64
import errno
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import yaml

from sidestep.lab import controllers
from sidestep.lab.api import certificates
from sidestep.lab.api.access import Access
from sidestep.lab.api.addresses import Ranges
from sidestep.lab.api.registry import Registry
from sidestep.lab.api.resources import NAMESPACE, SERVICE
from sidestep.lab.api.server import Server, listen
from sidestep.lab.api.store import Store
from sidestep.lab.api.tokens import TokenKey

KUBERNETES = "kubernetes.default.svc.cluster.local"


def main() -> int:
    """Parses the arguments and serves. 0: asked to stop; 1: could not start."""
    parser = argparse.ArgumentParser(prog="sidestep.lab.api", description="the lab's Kubernetes API")
    parser.add_argument("--name", required=True, help="of the lab")
    parser.add_argument("--bind", required=True, action="append", metavar="ADDRESS", help="may be given several times")
    parser.add_argument("--port", type=int, default=6443)
    parser.add_argument("--dir", required=True, type=Path, help="for the kubeconfig")
    parser.add_argument("--service-cidr4", default="10.96.0.0/20")
    parser.add_argument("--service-cidr6", default="fd5d:e57e:0:200::/112")
    parser.add_argument(
        "--agent-account",
        action="append",
        default=[],
        metavar="NAMESPACE/NAME",
        help="a service account with the rights of a node agent",
    )
    args = parser.parse_args()
    try:
        return asyncio.run(serve(args))
    except OSError as error:
        where = f"{', '.join(args.bind)} port {args.port}"
        if error.errno == errno.EADDRINUSE:
            why = f"another process listens there already: end it, or choose another --port ({where})"
        else:
            why = f"{os.strerror(error.errno) if error.errno else error} ({where}, {args.dir})"
        print(f"lab API: {why}", file=sys.stderr)
    except ValueError as error:
        print(f"lab API: {error}", file=sys.stderr)
    return 1


async def serve(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT. Raises OSError where it cannot listen or write."""
    ranges = Ranges.parse(args.service_cidr4, args.service_cidr6)
    first = [str(ranges.v4[1]), str(ranges.v6[1])]
    names = [
        *dict.fromkeys([*args.bind, *first]),
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
    ]
    ca_pem, context = certificates.make([*names, KUBERNETES])
    store, token = Store(), secrets.token_urlsafe(32)
    registry = Registry(store, ranges, ca_pem)
    access = Access(store, TokenKey(), token, tuple(args.agent_account), time.time)
    server = Server(registry, access, time.time)
    for namespace in ("default", "kube-system"):
        registry.create(NAMESPACE, "", {"metadata": {"name": namespace}})
    spec = {
        "clusterIPs": first,
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [{"name": "https", "port": 443, "targetPort": args.port}],
    }
    registry.create(SERVICE, "default", {"metadata": {"name": "kubernetes"}, "spec": spec})
    controllers.publish_api(registry, args.bind, args.port)
    runner = server.runner()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await listen(runner, args.bind, args.port, context)
        write_kubeconfig(args.dir / "kubeconfig", args.name, args.bind[0], args.port, ca_pem, token)
        print(f"ready {args.dir / 'kubeconfig'}", flush=True)
        async with asyncio.TaskGroup() as group:
            work = group.create_task(controllers.run(registry), name="controllers")
            await stop.wait()
            work.cancel()
    finally:
        await runner.cleanup()
    return 0


def write_kubeconfig(path: Path, name: str, address: str, port: int, ca_pem: str, token: str) -> None:
    """Puts the kubeconfig in place in one step, readable by its owner only."""
    host = f"[{address}]" if ":" in address else address
    cluster = {
        "server": f"https://{host}:{port}",
        "certificate-authority-data": base64.b64encode(ca_pem.encode()).decode(),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
        "current-context": name,
    }
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        os.fchmod(file.fileno(), 0o600)
        yaml.safe_dump(config, file, sort_keys=False)
    os.replace(fresh, path)


if __name__ == "__main__":
    sys.exit(main())
