"""The lab's controllers: what Kubernetes' controller manager and scheduler do, as far as the lab needs it.

Each controller is a function that looks at the whole store and writes what is missing (`sync`), and a predicate that
says after which events it has to look again. Nothing is remembered between two looks, so a look too many does no harm
and none can be lost. A lab has hundreds of objects, not thousands.
"""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.registry import Registry
from sidestep.lab.api.resources import DEPLOYMENT, ENDPOINT_SLICE, NODE, POD, REPLICA_SET, SERVICE, SERVICE_ACCOUNT
from sidestep.lab.api.store import Event
from sidestep.lab.controllers import deployments, endpoints, garbage, scheduler

RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Controller:
    """A name for people, when to look, and the look."""

    name: str
    wants: Callable[[Event], bool]
    sync: Callable[[Registry], None]


CONTROLLERS = (
    Controller("garbage", garbage.wants, garbage.sync),
    Controller(
        "deployments",
        lambda event: event.kind in (DEPLOYMENT, REPLICA_SET, POD, SERVICE_ACCOUNT),
        deployments.sync,
    ),
    Controller("scheduler", lambda event: event.kind in (POD, NODE), scheduler.sync),
    Controller("endpoints", lambda event: event.kind in (POD, SERVICE, ENDPOINT_SLICE), endpoints.sync),
)


async def run(registry: Registry) -> None:
    """Runs all controllers until cancelled."""
    async with asyncio.TaskGroup() as group:
        for controller in CONTROLLERS:
            group.create_task(_follow(registry, controller), name=controller.name)


async def _follow(registry: Registry, controller: Controller) -> None:
    """Looks, and looks again after events; a refused write is said and tried again a second later."""
    wake = asyncio.Event()

    def note(event: Event) -> None:
        if controller.wants(event):
            wake.set()

    registry.store.listen(note)
    said = ""
    while True:
        wake.clear()
        retry: float | None = None
        try:
            controller.sync(registry)
            said = ""
        except ApiError as error:
            retry = RETRY_S
            if error.message != said:
                said = error.message
                print(f"lab API: {controller.name}: {said}", file=sys.stderr, flush=True)
        try:
            await asyncio.wait_for(wake.wait(), retry)
        except TimeoutError:
            continue


def publish_api(registry: Registry, addresses: list[str], port: int) -> None:
    """The endpoints of Service default/kubernetes: the API itself. Loopback addresses are nobody's endpoint."""
    for version in (4, 6):
        found = [item for item in addresses if ip_address(item).version == version and not ip_address(item).is_loopback]
        if found:
            body = {
                "metadata": {"name": f"kubernetes-v{version}", "labels": {endpoints.SERVICE_NAME: "kubernetes"}},
                "addressType": f"IPv{version}",
                "endpoints": [{"addresses": found, "conditions": {"ready": True}}],
                "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
            }
            registry.create(ENDPOINT_SLICE, "default", body)
