"""`sidestep control`: reads the command line once, builds the parts, runs them in one TaskGroup.

Exit status: 0 after SIGTERM or SIGINT, 1 where it cannot start (one line says why and what to do).
"""

import argparse
import asyncio
import ipaddress
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

XDS_PORT = 15012
PLAIN_PORT = 15010
PAGES_PORT = 15014
LIFETIME_S = 86400


@dataclass(frozen=True, slots=True)
class Config:
    """The command line, checked. `bind`: an address, or "::" and "0.0.0.0" for all."""

    kubeconfig: Path | None
    bind: str
    namespace: str
    trust_domain: str
    cluster_id: str
    domain: str
    network: str
    cacerts: Path | None
    trusted: tuple[str, ...]
    max_ttl_s: int
    plaintext: bool


class StartError(Exception):
    """It cannot start; says what is wrong and what to do."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `control` to the command."""
    text = "the control plane: Kubernetes objects to xDS, certificate authority"
    parser = subparsers.add_parser("control", help=text, description=text)
    add = parser.add_argument
    add("--kubeconfig", type=Path, metavar="FILE", help="default: the pod's own service account")
    add("--bind", default="::", metavar="IP", help="address of ports 15012 and 15014 (default: all)")
    add("--namespace", default="istio-system", metavar="NS", help="namespace of Secret sidestep-ca")
    add("--trust-domain", default="cluster.local", metavar="TD")
    add("--cluster-id", default="Kubernetes", metavar="ID")
    add("--cluster-domain", default="cluster.local", metavar="DOMAIN", help="DNS suffix of Services")
    add("--network", default="", metavar="N", help="default: the system namespace's label topology.istio.io/network")
    add("--cacerts", type=Path, metavar="DIR", help="ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem")
    add(
        "--trusted-account",
        action="append",
        default=[],
        metavar="NS/SA",
        help="accounts of node agents (default: NAMESPACE/ztunnel and NAMESPACE/sidestep-agent)",
    )
    add("--max-ttl-s", type=int, default=LIFETIME_S, metavar="S", help="longest life of a certificate, at most a day")
    add("--plaintext", action="store_true", help="xDS without TLS and token on 127.0.0.1:15010, for debugging")


def config_of(args: argparse.Namespace) -> Config:
    """Checks the command line. Raises StartError."""
    try:
        bind = str(ipaddress.ip_address(args.bind))
    except ValueError:
        raise StartError(f"--bind {args.bind!r} is no address") from None
    if not re.fullmatch(r"[a-z0-9._-]{1,255}", args.trust_domain):
        raise StartError(f"--trust-domain {args.trust_domain!r}: lower-case letters, digits, dots, dashes only")
    if not 1 <= args.max_ttl_s <= LIFETIME_S:
        raise StartError(f"--max-ttl-s must be 1 to {LIFETIME_S}")
    for account in args.trusted_account:
        if not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9.-]+", account):
            raise StartError(f"--trusted-account {account!r} is not NAMESPACE/SERVICEACCOUNT")
    return Config(
        kubeconfig=args.kubeconfig,
        bind=bind,
        namespace=args.namespace,
        trust_domain=args.trust_domain,
        cluster_id=args.cluster_id,
        domain=args.cluster_domain,
        network=args.network,
        cacerts=args.cacerts,
        trusted=tuple(args.trusted_account) or (f"{args.namespace}/ztunnel", f"{args.namespace}/sidestep-agent"),
        max_ttl_s=args.max_ttl_s,
        plaintext=args.plaintext,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the control plane until SIGTERM or SIGINT."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else its threads write lines of their own into the log
    from sidestep.control.authority import AuthorityError
    from sidestep.control.wiring import serve
    from sidestep.kube.client import ConfigError, KubeError

    try:
        return asyncio.run(serve(config_of(args)))
    except (StartError, AuthorityError, ConfigError) as error:
        print(f"sidestep control: {error}", file=sys.stderr)
    except KubeError as error:
        print(f"sidestep control: {error}; is the API's address right, and may this account do that?", file=sys.stderr)
    return 1
