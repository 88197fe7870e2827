"""Readiness probes: http and tcp from the node's namespace, exec in the container. One attempt per call."""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

from sidestep.lab.podspec import Probe
from sidestep.lab.sandbox import SandboxError, enter

_HEAD_BYTES = 64 * 1024
_SAID_BYTES = 160  # of the body of a refusal, for the message


async def attempt(probe: Probe, address: str, container: Path) -> str:
    """Asks once. Returns "" for success, else why not; never longer than the probe's timeout."""
    try:
        async with asyncio.timeout(probe.timeout_s):
            if probe.kind == "exec":
                return await _exec(probe.command, container)
            if probe.kind == "tcpSocket":
                _, writer = await asyncio.open_connection(probe.host or address, probe.port)
                writer.close()
                return ""
            return await _http(probe, address)
    except TimeoutError:
        return f"no answer within {probe.timeout_s:g} s"
    except (OSError, ValueError, SandboxError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return str(error) or type(error).__name__


async def _http(probe: Probe, address: str) -> str:
    host = probe.host or address
    context = None
    if probe.scheme == "HTTPS":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(host, probe.port, ssl=context, limit=_HEAD_BYTES)
    try:
        headers = {"Host": f"[{host}]:{probe.port}" if ":" in host else f"{host}:{probe.port}"} | dict(probe.headers)
        lines = [f"GET {probe.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        lines += ["User-Agent: kube-probe/lab", "Accept: */*", "Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()
        status_line = (await reader.readuntil(b"\n")).split()
        if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/"):
            return "the answer is no HTTP"
        status = int(status_line[1])
        if 200 <= status < 400:
            return ""
        while (await reader.readline()).strip():
            pass
        said = (await reader.read(_SAID_BYTES)).decode(errors="replace").split("\n")[0].strip()
        return f"HTTP status {status}" + (f": {said}" if said else "")
    finally:
        writer.close()


async def _exec(command: Sequence[str], container: Path) -> str:
    argv, environment = enter(container, command)
    process = await asyncio.create_subprocess_exec(
        *argv, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    text = output.decode(errors="replace").strip()[-200:]
    return "" if process.returncode == 0 else f"status {process.returncode}: {text}"
