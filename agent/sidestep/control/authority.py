"""The certificate authority's key and what it signs. No I/O; the clock is an argument.

A *leaf* says one thing: this key is that identity, until then. Empty subject, the SPIFFE URI as the only, critical,
subject alternative name, usable by both ends of a TLS connection, not a CA. Everything in it is ours but the public
key: names and extensions of the request are not even looked at.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sidestep.model import Identity

LIFETIME_S = 86400
BACKDATE_S = 60  # clocks of nodes differ
ROOT_YEARS = 10
CSR_MAX = 16384
FILES = ("ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem")

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class AuthorityError(Exception):
    """The files are no usable authority; says which and why."""


class RequestError(Exception):
    """The signing request is refused; says why."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA certificate with its key, the certificates between it and the root, and the trusted roots (PEM, one or more:
    the first signed the chain, others are being introduced or withdrawn).
    """

    certificate: x509.Certificate
    key: PrivateKey
    chain: tuple[x509.Certificate, ...]
    roots_pem: str

    def leaf(self, csr_pem: str, identity: Identity, lifetime_s: int, now_s: float) -> list[str]:
        """A certificate for the key of a request: leaf, intermediates, roots, each in PEM. Raises RequestError."""
        leaf = self._sign(
            public_key(csr_pem),
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]),
            x509.Name([]),
            lifetime_s,
            now_s,
        )
        return [_pem(leaf), *(_pem(each) for each in self.chain), self.roots_pem]

    def server(
        self, names: Iterable[str], addresses: Iterable[str], lifetime_s: int, now_s: float
    ) -> tuple[bytes, bytes]:
        """A key and a chain for a TLS server of ours, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = list(dict.fromkeys(names))
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        leaf = self._sign(key.public_key(), x509.SubjectAlternativeName(alternatives), subject, lifetime_s, now_s)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return private, "".join([_pem(leaf), *(_pem(each) for each in self.chain)]).encode()

    def under(self) -> x509.Certificate:
        """The root that the chain leads to."""
        top = self.chain[-1] if self.chain else self.certificate
        for root in x509.load_pem_x509_certificates(self.roots_pem.encode()):
            if root == top or _issued(top, root):
                return root
        raise AssertionError("checked by load")

    def files(self) -> dict[str, str]:
        """As PEM by file name, for `load`. The private key is in it."""
        private = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "ca-cert.pem": _pem(self.certificate),
            "ca-key.pem": private.decode(),
            "cert-chain.pem": "".join(_pem(each) for each in self.chain),
            "root-cert.pem": self.roots_pem,
        }

    def _sign(
        self,
        key: PublicKey,
        names: x509.SubjectAlternativeName,
        subject: x509.Name,
        lifetime_s: int,
        now_s: float,
    ) -> x509.Certificate:
        """Never valid longer than anything that it depends on."""
        now = datetime.fromtimestamp(int(now_s), UTC)
        start = now - timedelta(seconds=min(BACKDATE_S, lifetime_s // 10))
        ends = [each.not_valid_after_utc for each in (self.certificate, *self.chain, self.under())]
        end = min(now + timedelta(seconds=lifetime_s), *ends)
        if end <= now:
            raise RequestError("the authority, or what vouches for it, has ended")
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(start, self.certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False, wrap=isinstance(key, rsa.RSAPublicKey)), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(names, critical=not list(subject))
            .add_extension(_issuer_id(self.certificate), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())


def public_key(csr_pem: str) -> PublicKey:
    """The key of a request that proves to hold it. Raises RequestError."""
    if len(csr_pem) > CSR_MAX:
        raise RequestError(f"a request of {len(csr_pem)} bytes")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RequestError(f"cannot be read: {error}") from None
    if isinstance(key, rsa.RSAPublicKey):
        if not 2048 <= key.key_size <= 8192:
            raise RequestError(f"an RSA key of {key.key_size} bits")
    elif not isinstance(key, ec.EllipticCurvePublicKey):
        raise RequestError("a key that is neither ECDSA nor RSA")
    elif not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise RequestError(f"a key on curve {key.curve.name}")
    if not signed:
        raise RequestError("its signature is not by its own key")
    return key


def new(trust_domain: str, now_s: float) -> Authority:
    """A new self-signed root."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(int(now_s), UTC)
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The name is the root's own: two roots of one name would be taken for each other when a chain is built.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, f"sidestep root {subject_id.digest.hex()[:12]}"),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=BACKDATE_S))
        .not_valid_after(now + timedelta(days=365 * ROOT_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(sign=True, wrap=False), critical=True)
        .add_extension(subject_id, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key, (), _pem(certificate))


def load(files: Mapping[str, str], now_s: float) -> Authority:
    """From PEM texts by file name: ca-cert.pem, ca-key.pem, root-cert.pem, and cert-chain.pem where there are
    intermediates. Raises AuthorityError unless the key is the certificate's and the chain ends in a root.
    """
    for name in FILES:
        if name != "cert-chain.pem" and not files.get(name):
            raise AuthorityError(f"{name} is missing")
    try:
        certificate = x509.load_pem_x509_certificate(files["ca-cert.pem"].encode())
        key = serialization.load_pem_private_key(files["ca-key.pem"].encode(), None)
        roots = x509.load_pem_x509_certificates(files["root-cert.pem"].encode())
        chain = x509.load_pem_x509_certificates(files["cert-chain.pem"].encode()) if files.get("cert-chain.pem") else []
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthorityError(f"a file cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise AuthorityError("ca-key.pem is neither an ECDSA nor an RSA key")
    if key.public_key() != certificate.public_key():
        raise AuthorityError("ca-key.pem is not the key of ca-cert.pem")
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        raise AuthorityError("ca-cert.pem is not the certificate of an authority")
    now = datetime.fromtimestamp(now_s, UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise AuthorityError(f"ca-cert.pem is valid until {certificate.not_valid_after_utc}, from then on no more")
    # The usual files begin the chain with the CA itself and may end it with the root; a peer needs what is between.
    path: list[x509.Certificate] = []
    if certificate not in roots:
        path = [certificate, *(each for each in chain if each != certificate and each not in roots)]
        _check_path(path, roots)
    return Authority(certificate, key, tuple(path), "".join(_pem(each) for each in roots))


def _check_path(path: list[x509.Certificate], roots: list[x509.Certificate]) -> None:
    for certificate, issuers in zip(path, [*([each] for each in path[1:]), roots], strict=True):
        if not any(_issued(certificate, issuer) for issuer in issuers):
            raise AuthorityError("ca-cert.pem and cert-chain.pem do not lead to root-cert.pem")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _usage(*, sign: bool, wrap: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=wrap,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_id(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
    except x509.ExtensionNotFound:
        key = issuer.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
