"""The agents of this machine: where their sockets are, and one question to all of them.

A node has one agent with its socket in /run/sidestep; a machine with labs has one for each of their nodes.
"""

import http.client
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = Path("/run/sidestep")
SOCKET = "agent.sock"
TIMEOUT_S = 10.0
CONTROL_PORT = 15014
CONTROL_S = 5.0


class NodeError(Exception):
    """An agent cannot be asked; says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Node:
    """One agent's socket. `lab` is "" for a real node."""

    path: Path
    lab: str = ""

    def ask(self, page: str) -> Any:
        """GETs a page of the agent (node/admin.py) as JSON. Raises NodeError."""
        connection = _UnixConnection(self.path)
        try:
            connection.request("GET", page, headers={"Host": "localhost"})
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise NodeError(f"{self.path}: {page} answered {response.status}: {_reason(body)}")
            return json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NodeError(f"{self.path}: {error}; does the agent of this node run?") from error
        finally:
            connection.close()


def find(lab: str = "", run_dirs: Iterable[Path] = ()) -> list[Node]:
    """The agents: of the directories given, else of one lab, else of this node, else of every lab. Raises NodeError."""
    given = [Node(path / SOCKET) for path in run_dirs]
    if given:
        return given
    if not lab and (RUN / SOCKET).exists():
        return [Node(RUN / SOCKET)]
    base = RUN / "lab"
    if lab and not (base / lab).is_dir():
        raise NodeError(f"there is no lab {lab!r}; `sidestep lab up --name {lab}` makes one")
    found = [Node(path, path.relative_to(base).parts[0]) for path in sorted(base.glob(f"{lab or '*'}/**/{SOCKET}"))]
    if not found:
        where = f"in lab {lab!r}" if lab else f"in {RUN}, nor in a lab"
        raise NodeError(
            f"no agent's socket {where}; is this a node of the mesh? (`sidestep lab up` makes a cluster here)"
        )
    return found


@dataclass(frozen=True, slots=True)
class Answering:
    """An agent that answered, by its node's name."""

    node: Node
    name: str
    status: dict[str, Any]


def asked(nodes: Iterable[Node]) -> tuple[list[Answering], list[str]]:
    """The agents that answer, and why the others do not."""
    found, problems = [], []
    for node in nodes:
        try:
            status = node.ask("/status")
            found.append(Answering(node, str(status["node"]), status))
        except (NodeError, KeyError) as error:
            problems.append(str(error))
    return found, problems


def one_mesh(agents: Iterable[Answering]) -> None:
    """Raises NodeError where the agents belong to several labs: what is asked has one answer in each."""
    labs = sorted({agent.node.lab for agent in agents})
    if len(labs) > 1:
        raise NodeError(f"there are several labs here ({', '.join(labs)}): say which with --lab NAME")


def control_addresses(agents: Iterable[Answering]) -> list[str]:
    """The control planes that the agents speak with, HOST:PORT."""
    return sorted({str((agent.status.get("control") or {}).get("address") or "") for agent in agents} - {""})


def control_status(address: str) -> dict[str, Any]:
    """The /status page of the control plane that agents reach at `address` (HOST:PORT). Raises NodeError."""
    host = address.rpartition(":")[0].strip("[]")
    connection = http.client.HTTPConnection(host, CONTROL_PORT, timeout=CONTROL_S)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise NodeError(f"the control plane at {host}:{CONTROL_PORT} answered {response.status}")
        return dict(json.loads(body))
    except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
        raise NodeError(f"the control plane at {host}:{CONTROL_PORT} cannot be asked: {error}") from error
    finally:
        connection.close()


def _reason(body: bytes) -> str:
    """What a page that failed says of it, on one line: its {"error": text}, else its beginning."""
    text = body.decode(errors="replace")
    try:
        text = str(json.loads(text)["error"])
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(text.split())[:200]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
