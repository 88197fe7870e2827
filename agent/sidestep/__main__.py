"""The `sidestep` command: picks the part that was asked for and imports nothing else.

Each part has a `command` module with `add_parser(subparsers)` and `run(args) -> int`. The engine's host must stay
small, so a part is imported only when its name is the first argument; `--help` alone lists the names with one line
each.
"""

import argparse
import importlib
import sys

from sidestep import __version__

PARTS: dict[str, tuple[str, str]] = {
    "agent": ("sidestep.node.command", "the node agent: enrols pods, feeds the engine"),
    "engine": ("sidestep.engine.host", "the engine's process: carries the traffic of a node's pods"),
    "control": ("sidestep.control.command", "the control plane: Kubernetes objects to xDS, certificate authority"),
    "lab": ("sidestep.lab.command", "a cluster on this machine, in network namespaces"),
    "check": ("sidestep.cli.check", "can this machine run sidestep? (touches nothing)"),
    "status": ("sidestep.cli.show", "control plane, nodes, pods that are enrolled or not and why"),
    "pods": ("sidestep.cli.show", "the pods of the nodes: mode, identity, ports, old connections"),
    "workloads": ("sidestep.cli.show", "the workloads that the engine knows"),
    "services": ("sidestep.cli.show", "the services that the engine knows"),
    "certificates": ("sidestep.cli.show", "identities on the nodes and when their certificates end"),
    "connections": ("sidestep.cli.show", "open connections through the mesh"),
    "policies": ("sidestep.cli.policies", "the policies of the mesh, and what of them is not enforced"),
    "authz": ("sidestep.cli.authz", "may one workload connect to another, and which policy says so?"),
    "describe": ("sidestep.cli.describe", "everything about a pod on one page"),
    "version": ("sidestep.cli.version", "versions of sidestep, its engine and libraries"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one part. Returns the exit status: 0 done, 1 failed (one line on stderr says what to do), 2 wrong usage."""
    args = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sidestep", description="A service mesh without sidecars.")
    parser.add_argument("--version", action="version", version=f"sidestep {__version__}")
    subparsers = parser.add_subparsers(dest="part", metavar="COMMAND", required=True)
    if args and args[0] in PARTS:
        module = importlib.import_module(PARTS[args[0]][0])
        if PARTS[args[0]][0] == "sidestep.cli.show":
            module.add_parser(subparsers, args[0], PARTS[args[0]][1])
        else:
            module.add_parser(subparsers)
        parsed = parser.parse_args(args)
        try:
            return int(module.run(parsed))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 141
    for name, (_, line) in PARTS.items():
        subparsers.add_parser(name, help=line)
    parser.parse_args(args)
    return 2


if __name__ == "__main__":
    sys.exit(main())
