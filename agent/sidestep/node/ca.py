"""Certificates from the certificate authority: key made here, CSR sent, chain checked. Keys stay in memory and out
of logs.

The request is `istio.v1.auth.IstioCertificateService/CreateCertificate` over TLS, with the node's token read anew
each time and the wanted identity as ImpersonatedIdentity (reference/ztunnel.md 4). The answer is leaf,
intermediates, roots; only a chain whose leaf carries our key and exactly the identity that was asked for is taken.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidestep.node.agent import CertificateError
from sidestep.node.identities import Certificate
from sidestep.wire import proto

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
LIFETIME_S = 86400
REQUEST_S = 10.0
REPLACED = "the channel to the authority was replaced meanwhile"


class Authority:
    """Issues certificates over the channel that `channel` answers; told True, it looks whether the root has changed."""

    def __init__(
        self, channel: Callable[[bool], Awaitable[grpc.aio.Channel]], token_file: Path | None, cluster_id: str
    ) -> None:
        self._channel = channel
        self._token_file = token_file
        self._cluster_id = cluster_id
        self._suspect = False

    async def issue(self, uri: str) -> Certificate:
        """A certificate for an identity. Raises CertificateError."""
        key = ec.generate_private_key(ec.SECP256R1())
        # IstioCertificateRequest: csr, validity_duration, metadata; the answer: cert_chain
        request = (
            proto.field(1, signing_request(key, uri))
            + proto.field(3, LIFETIME_S)
            + proto.field(4, proto.struct({"ImpersonatedIdentity": uri}))
        )
        try:
            call = (await self._channel(self._suspect)).unary_unary(METHOD, None, None)
            metadata = await asyncio.to_thread(credentials, self._token_file, self._cluster_id)
            response: bytes = await call(request, timeout=REQUEST_S, metadata=metadata)
            self._suspect = False
        except grpc.aio.AioRpcError as err:
            self._suspect = True
            raise CertificateError(f"{err.code().name}: {err.details()}") from None
        except grpc.aio.UsageError:
            raise CertificateError(REPLACED) from None
        except asyncio.CancelledError:
            # Closing a channel cancels its calls: that is an end of the request, not of the task.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise CertificateError(REPLACED) from None
        except (OSError, ValueError) as err:
            raise CertificateError(str(err)) from None
        try:
            chain = proto.texts(response, 1)
        except ValueError as err:
            raise CertificateError(f"the authority's answer cannot be read: {err}") from None
        return current(accept(uri, key, chain), time.time())


def credentials(token_file: Path | None, cluster_id: str) -> tuple[tuple[str, str], ...]:
    """The headers that say who asks; the token is read anew each time. Raises OSError."""
    headers = [("clusterid", cluster_id)]
    if token_file is not None:
        headers.append(("authorization", f"Bearer {token_file.read_text().strip()}"))
    return tuple(headers)


def signing_request(key: ec.EllipticCurvePrivateKey, uri: str) -> str:
    """A CSR in PEM: empty subject, one critical URI SAN."""
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    request = builder.add_extension(names, critical=True).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def accept(uri: str, key: ec.EllipticCurvePrivateKey, chain: list[str]) -> Certificate:
    """Checks an answer of the authority. Raises CertificateError where it is not a certificate of ours."""
    if len(chain) < 2:
        raise CertificateError("the authority's answer holds no root certificate" if chain else "an empty chain")
    try:
        certificates = [x509.load_pem_x509_certificate(pem.encode()) for pem in chain[:-1]]
        roots = x509.load_pem_x509_certificates(chain[-1].encode())
        leaf = certificates[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as err:
        raise CertificateError(f"the authority's answer cannot be read: {err}") from None
    if found != [uri]:
        raise CertificateError(f"a certificate for {', '.join(found) or 'nobody'} instead of {uri}")
    if leaf.public_key() != key.public_key():
        raise CertificateError("a certificate for another key")
    _check_signatures(certificates, roots)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(
        key_pem=private.decode(),
        chain_pem="".join(_ended(pem) for pem in chain[:-1]),
        roots_pem=_ended(chain[-1]),
        not_before_s=leaf.not_valid_before_utc.timestamp(),
        not_after_s=leaf.not_valid_after_utc.timestamp(),
        serial=str(leaf.serial_number),
    )


def current(certificate: Certificate, now_s: float) -> Certificate:
    """The certificate. Raises CertificateError where it has ended already: nobody would take it."""
    if certificate.not_after_s <= now_s:
        ended = f"{now_s - certificate.not_after_s:.0f} s ago"
        raise CertificateError(f"the authority's certificate ended {ended}: do the clocks differ?")
    return certificate


def _check_signatures(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> None:
    """Each certificate is signed by the next, the last by a root. The engine's peers check the rest."""
    issuers = [*([each] for each in chain[1:]), roots]
    for certificate, candidates in zip(chain, issuers, strict=True):
        for issuer in candidates:
            try:
                certificate.verify_directly_issued_by(issuer)
                break
            except (ValueError, TypeError, InvalidSignature):
                continue
        else:
            raise CertificateError("the authority's chain does not end in its root")


def _ended(pem: str) -> str:
    return pem if pem.endswith("\n") else pem + "\n"
