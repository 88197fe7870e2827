"""Cluster DNS: dnsmasq with the names of all Services, behind Service kube-system/kube-dns.

Follows Services and EndpointSlices, writes a hosts file and lets dnsmasq read it again (SIGHUP). Both families;
headless Services name their ready endpoints. There is nothing upstream: names outside the cluster are refused.
Runs in the control plane's namespace; dnsmasq is its child and dies with it.
"""

import asyncio
import ctypes
import os
import signal
import sys

from sidestep.kube.client import KubeClient
from sidestep.kube.watch import Reflector
from sidestep.lab.cluster import DOMAIN, Cluster, load
from sidestep.lab.services import Service, Slice, hosts, service_of, slice_of

_PR_SET_PDEATHSIG = 1
TTL_S = 5
QUIET_S = 0.05  # changes come in groups: one reload for each group


def command(cluster: Cluster) -> list[str]:
    """dnsmasq's command line."""
    return [
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-poll",
        f"--addn-hosts={cluster.state / 'hosts'}", f"--local=/{DOMAIN}/", "--local=/in-addr.arpa/",
        "--local=/ip6.arpa/", f"--local-ttl={TTL_S}", f"--neg-ttl={TTL_S}", "--cache-size=0", "--bind-interfaces",
        f"--listen-address={cluster.ip4}", f"--listen-address={cluster.ip6}", "--log-facility=-", "--user=root",
        "--pid-file=",
    ]  # fmt: skip


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _write(cluster: Cluster, text: str) -> bool:
    path = cluster.state / "hosts"
    if path.exists() and path.read_text() == text:
        return False
    fresh = path.with_name(".hosts")
    fresh.write_text(text)
    os.replace(fresh, path)
    return True


async def serve(cluster: Cluster) -> int:
    """Runs until dnsmasq ends; returns its status."""
    changed = asyncio.Event()
    async with KubeClient.from_config(cluster.kubeconfig) as client:
        services: Reflector[Service] = Reflector(client, "/api/v1/services", service_of, lambda *_: changed.set())
        slices: Reflector[Slice] = Reflector(
            client, "/apis/discovery.k8s.io/v1/endpointslices", slice_of, lambda *_: changed.set()
        )
        _write(cluster, "\n")
        process = await asyncio.create_subprocess_exec(*command(cluster), preexec_fn=_die_with_parent)

        async def follow() -> None:
            await services.synced.wait()
            await slices.synced.wait()
            while True:
                await asyncio.sleep(QUIET_S)
                changed.clear()
                if _write(cluster, hosts(services.items, slices.items.values(), DOMAIN)):
                    process.send_signal(signal.SIGHUP)
                await changed.wait()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(services.run()), group.create_task(slices.run()), group.create_task(follow())]
            status = await process.wait()
            for task in tasks:
                task.cancel()
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(load(sys.argv[1]))) or 1)
