"""The agent's end of the channel: it ends when it is told to."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidestep.node.engine import Engine, Hello


async def connected(_: Hello) -> None:
    """Nothing to feed."""


@contextmanager
def asked(folder: Path) -> Iterator[tuple[asyncio.Task[None], socket.socket]]:
    """The agent's end at work, and where it connects to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as server:
        server.bind(str(folder / "engine.sock"))
        server.listen(8)
        run = Engine(folder / "engine.sock", connected, lambda: None).run()
        yield asyncio.get_running_loop().create_task(run), server


async def goes(server: socket.socket) -> None:
    """An engine takes the next connection, hears HELLO, and is gone."""
    loop = asyncio.get_running_loop()
    accepted, _ = await asyncio.wait_for(loop.sock_accept(server), 20)
    await loop.sock_recv(accepted, 65536)
    accepted.close()


@pytest.mark.parametrize("turns", range(8))
def test_it_ends_although_the_engine_goes_at_the_same_moment(tmp_path: Path, turns: int) -> None:
    """Whatever is first: the connection's end, or the order to end, this many turns of the loop later."""

    async def work() -> None:
        with asked(tmp_path) as (task, server):
            await goes(server)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=20)
            ended = task.done()
            task.cancel()
            assert ended

    asyncio.run(work())


def test_it_comes_back_after_the_engine_went(tmp_path: Path) -> None:
    """Again and again, whatever state the connection was in."""

    async def work() -> None:
        with asked(tmp_path) as (task, server):
            for _ in range(5):
                await goes(server)
            task.cancel()
            await asyncio.wait({task}, timeout=20)
            assert task.cancelled()

    asyncio.run(work())
