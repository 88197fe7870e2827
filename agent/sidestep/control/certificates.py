"""CreateCertificate: who asks, for whom, and may they. Every refusal has its reason in our log and none for the caller.

All of these must hold (a negative test for each in tests/unit/test_ca.py): the call came over TLS (the service is on
that port only); the caller is a node's agent (callers.py); the identity is of our trust domain; a pod with that account
is on the caller's node, not ended, with a network of its own; the request proves to hold its key. The lifetime is what
was asked for, at most ours.
"""

import asyncio
import time
from typing import Any, TypeAlias

import grpc

from sidestep import log
from sidestep.control.authority import RequestError
from sidestep.control.callers import Denied, Gate, Unauthenticated, Unavailable
from sidestep.control.metrics import Metrics
from sidestep.control.roots import Current
from sidestep.model import Identity, IdentityError
from sidestep.wire.pb import citadel_pb2

SERVICE = "istio.v1.auth.IstioCertificateService"
READ_S = 10.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Certificates:
    """The gRPC service."""

    def __init__(self, gate: Gate, current: Current, trust_domain: str, max_ttl_s: int, metrics: Metrics) -> None:
        self._gate = gate
        self._current = current
        self._trust_domain = trust_domain
        self._max_ttl_s = max_ttl_s
        self._metrics = metrics

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """For a server. The request is taken as a stream of one: nothing of it is read before the caller is known."""
        method = grpc.stream_unary_rpc_method_handler(
            self._create,
            request_deserializer=citadel_pb2.IstioCertificateRequest.FromString,
            response_serializer=citadel_pb2.IstioCertificateResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"CreateCertificate": method})

    async def _create(self, _requests: object, context: Context) -> object:
        code = grpc.StatusCode.PERMISSION_DENIED
        caller = asked = ""
        try:
            who = await self._gate.caller(headers(context))
            caller = f"{who.pod} on {who.node}"
            async with asyncio.timeout(READ_S):
                request = await context.read()
            if request is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise Denied("no request came")
            asked = str(request.metadata["ImpersonatedIdentity"]) if "ImpersonatedIdentity" in request.metadata else ""
            identity = self._identity(asked)
            if not await self._gate.runs(who.node, identity.namespace, identity.service_account):
                raise Denied(f"no pod of {identity.account} is on {who.node}")
            lifetime_s = min(request.validity_duration, self._max_ttl_s)
            if lifetime_s <= 0:
                lifetime_s = self._max_ttl_s
            chain = self._current.authority.leaf(request.csr, identity, lifetime_s, time.time())
        except Unauthenticated as error:
            code, reason = grpc.StatusCode.UNAUTHENTICATED, str(error)
        except (Denied, IdentityError, RequestError) as error:
            reason = str(error)
        except TimeoutError:
            reason = "no request came"
        except Unavailable as error:
            code, reason = grpc.StatusCode.UNAVAILABLE, str(error)
        else:
            self._metrics.certificates.labels("issued").inc()
            log.event("certificate", identity=identity, node=who.node, lifetime_s=lifetime_s)
            return citadel_pb2.IstioCertificateResponse(cert_chain=chain)
        self._metrics.certificates.labels(code.name.lower()).inc()
        log.event("certificate_refused", caller=caller, asked=asked[:300], code=code.name, reason=reason)
        return await context.abort(code, OPAQUE[code])

    def _identity(self, asked: str) -> Identity:
        identity = Identity.parse(asked)
        if identity.trust_domain != self._trust_domain:
            raise Denied(f"trust domain {identity.trust_domain} is not {self._trust_domain}")
        return identity


OPAQUE = {
    grpc.StatusCode.UNAUTHENTICATED: "request authenticate failure",
    grpc.StatusCode.PERMISSION_DENIED: "request refused",
    grpc.StatusCode.UNAVAILABLE: "cannot be decided now, try again",
}


def headers(context: Context) -> dict[str, str]:
    """The text headers of a call; of one that came twice, neither: it is not known which was meant."""
    found: dict[str, str] = {}
    twice = set()
    for key, value in context.invocation_metadata() or ():
        if key in found:
            twice.add(key)
        if isinstance(value, str):
            found[key] = value
    return {key: value for key, value in found.items() if key not in twice}
