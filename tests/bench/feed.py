"""`python -m tests.bench.feed SOCKET ADDRESS TOKEN_FILE`: an agent with its stream and its engine client, and no pods.

All of the agent's modules are loaded, as in a real one; what is not there are the watches of the node's own pods, whose
size has nothing to do with how many workloads the mesh has.
"""

import asyncio
import sys
from pathlib import Path

import grpc

import sidestep.node.wiring
from sidestep.node.engine import Engine, Hello
from sidestep.node.metrics import Metrics
from sidestep.node.xds import Stream


async def main(engine_socket: Path, address: str, token: Path) -> None:
    """Until it is ended."""
    channel = grpc.aio.insecure_channel(address, options=list(sidestep.node.wiring.GRPC_OPTIONS))

    async def same(_: bool) -> grpc.aio.Channel:
        return channel

    async def connected(hello: Hello) -> None:
        stream.engine_holds(hello)

    engine = Engine(engine_socket, connected, lambda: None)
    stream = Stream(same, address, "ztunnel~10.0.0.1~a.b~b.svc.c", {}, token, "Kubernetes", engine, Metrics())
    async with asyncio.TaskGroup() as group:
        group.create_task(engine.run(), name="engine")
        group.create_task(stream.run(), name="stream")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
