"""`sidestep version`: what is installed, and what the running machine offers."""

import argparse
import json
import platform
import ssl
import sys
from typing import Any

from sidestep import __version__


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `version`."""
    parser = subparsers.add_parser("version", help="versions of sidestep, its engine and libraries")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints name and version of every part that decides about behaviour."""
    found: dict[str, Any] = {"sidestep": __version__, "python": platform.python_version(), "kernel": platform.release()}
    try:
        import sidestep._tunnel as _tunnel

        found["engine_openssl"] = _tunnel.ffi.string(_tunnel.lib.tunnel_openssl_version()).decode()
        found["engine_aes_gcm"] = _tunnel.ffi.string(_tunnel.lib.tunnel_aes_gcm()).decode()
    except ImportError as error:
        found["engine_openssl"] = f"not built: {error}; run `make build`"
    found["python_openssl"] = ssl.OPENSSL_VERSION
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}")
    return 0
