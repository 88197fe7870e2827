"""A certificate authority for tests: good leaves, and each kind of bad one."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def spiffe(account: str, namespace: str = "default", trust_domain: str = "cluster.local") -> str:
    """The SPIFFE URI of a service account."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{account}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """PEM texts, as the agent hands them to the engine."""

    key: str
    chain: str
    roots: str


class Authority:
    """Signs leaves for SPIFFE identities."""

    def __init__(self, name: str = "test root") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=10))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.roots = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.between = ""  # what comes between a leaf and the root

    def intermediate(self) -> "Authority":
        """An authority that this one vouches for: its leaves bring its certificate along, the root is this one's."""
        below = Authority("test intermediate")
        now = datetime.now(UTC)
        below._certificate = (
            x509.CertificateBuilder()
            .subject_name(below._certificate.subject)
            .issuer_name(self._certificate.subject)
            .public_key(below._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=10))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        below.between = below._certificate.public_bytes(serialization.Encoding.PEM).decode()
        below.roots = self.roots
        return below

    def leaf(
        self,
        *uris: str,
        not_after: timedelta = timedelta(hours=24),
        self_signed: bool = False,
        server: bool = True,
        client: bool = True,
    ) -> Leaf:
        """A leaf with these URI SANs (none, one or more); the rest makes it wrong in other ways."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(x509.Name([]) if self_signed else self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + not_after)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if not names:
            names = [x509.DNSName("localhost")]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        certificate = builder.sign(key if self_signed else self._key, hashes.SHA256())
        return Leaf(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            certificate.public_bytes(serialization.Encoding.PEM).decode() + self.between,
            self.roots,
        )


BAD = ("other trust domain", "other account", "expired", "no SPIFFE SAN", "two SANs", "self-signed", "other root")


def bad_leaf(authority: Authority, kind: str, identity: str) -> Leaf:
    """A leaf that is wrong in one way."""
    good = authority.leaf(identity)
    if kind == "other trust domain":
        return authority.leaf(identity.replace("cluster.local", "example.org"))
    if kind == "other account":
        return authority.leaf(spiffe("somebody-else"))
    if kind == "expired":
        return authority.leaf(identity, not_after=timedelta(hours=-1))
    if kind == "no SPIFFE SAN":
        return authority.leaf()
    if kind == "two SANs":
        return authority.leaf(identity, spiffe("somebody-else"))
    if kind == "self-signed":
        return authority.leaf(identity, self_signed=True)
    stranger = Authority("another root").leaf(identity)
    return Leaf(stranger.key, stranger.chain, good.roots)
