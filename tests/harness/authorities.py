"""Authorities as operators bring them, for tests of the one that the control plane is."""

import time
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidestep.control import authority
from sidestep.control.authority import Authority

NOW = time.time()


def with_intermediate() -> Authority:
    """An authority as an operator brings it: a root that stays away, an intermediate, and the CA."""
    root = authority.new("corp", NOW)
    middle, middle_key = signed_ca("middle", root.certificate, root.key)
    ca, ca_key = signed_ca("ca", middle, middle_key)
    chain = "".join(pem(each) for each in (ca, middle, root.certificate))
    files = {
        "ca-cert.pem": pem(ca),
        "ca-key.pem": key_pem(ca_key),
        "cert-chain.pem": chain,
        "root-cert.pem": root.roots_pem,
    }
    return authority.load(files, NOW)


def signed_ca(
    name: str,
    issuer: x509.Certificate,
    key: authority.PrivateKey,
    start: float = NOW - 60,
    end: float = NOW + 86400 * 9,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate of an authority, and its key."""
    own = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(start, UTC))
        .not_valid_after(datetime.fromtimestamp(end, UTC))
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_public(issuer)), False)
    )
    return builder.sign(key, hashes.SHA256()), own


def _public(of: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = of.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def pem(of: x509.Certificate) -> str:
    """A certificate as text."""
    return of.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: Any) -> str:
    """A key as text."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return str(key.private_bytes(*form).decode())
