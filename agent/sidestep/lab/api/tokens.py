"""Service-account tokens: signed here, and checked here.

A token is a JWT (ES256) with the claims that Kubernetes uses: issuer, audiences, times, subject
`system:serviceaccount:NAMESPACE:NAME` and, under `kubernetes.io`, account, pod and node with their UIDs. The key lives
as long as the API's process, as the objects do. Pure but for the key: the clock is an argument.
"""

import base64
import binascii
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

ISSUER = "https://kubernetes.default.svc.cluster.local"
API_AUDIENCE = ISSUER
MAX_TOKEN_BYTES = 16384
KEY_ID = "lab"


class TokenError(Exception):
    """A token that is not good; says why."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An object that a token is bound to."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says. Times are seconds since the epoch."""

    audiences: tuple[str, ...]
    namespace: str
    account: Reference
    pod: Reference | None
    node: Reference | None
    not_before: int
    expires: int
    id: str

    @property
    def user(self) -> str:
        """The Kubernetes user name."""
        return f"system:serviceaccount:{self.namespace}:{self.account.name}"


class TokenKey:
    """Signs and checks."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def sign(
        self,
        *,
        namespace: str,
        account: Reference,
        pod: Reference | None,
        node: Reference | None,
        audiences: Sequence[str],
        now: int,
        seconds: int,
    ) -> str:
        """A token that is good from `now` for `seconds`."""
        bound: dict[str, Any] = {"namespace": namespace, "serviceaccount": _reference(account)}
        if pod is not None:
            bound["pod"] = _reference(pod)
        if node is not None:
            bound["node"] = _reference(node)
        claims = {
            "aud": list(audiences),
            "exp": now + seconds,
            "iat": now,
            "iss": ISSUER,
            "jti": secrets.token_hex(16),
            "kubernetes.io": bound,
            "nbf": now,
            "sub": f"system:serviceaccount:{namespace}:{account.name}",
        }
        head = {"alg": "ES256", "kid": KEY_ID, "typ": "JWT"}
        signed = ".".join(_encode(json.dumps(part, separators=(",", ":")).encode()) for part in (head, claims))
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def check(self, token: str, now: int) -> Claims:
        """What a token says, when it is ours and in time. Raises TokenError. Audiences are the caller's matter."""
        if len(token) > MAX_TOKEN_BYTES:
            raise TokenError("the token is too long")
        parts = token.split(".")
        if len(parts) != 3:
            raise TokenError("not a JWT")
        try:
            head = json.loads(_decode(parts[0]))
            signature = _decode(parts[2])
            if not isinstance(head, dict) or head.get("alg") != "ES256" or head.get("kid") != KEY_ID:
                raise TokenError("not signed by this API")
            if len(signature) != 64:
                raise TokenError("the signature is not good")
            der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
            self._key.public_key().verify(der, f"{parts[0]}.{parts[1]}".encode(), ec.ECDSA(hashes.SHA256()))
            found = json.loads(_decode(parts[1]))
            bound = found["kubernetes.io"]
            claims = Claims(
                audiences=tuple(found["aud"]),
                namespace=bound["namespace"],
                account=Reference(**bound["serviceaccount"]),
                pod=Reference(**bound["pod"]) if "pod" in bound else None,
                node=Reference(**bound["node"]) if "node" in bound else None,
                not_before=found["nbf"],
                expires=found["exp"],
                id=found["jti"],
            )
        except InvalidSignature:
            raise TokenError("the signature is not good") from None
        except (ValueError, KeyError, TypeError):
            raise TokenError("not a service account's token") from None
        if now < claims.not_before:
            raise TokenError("the token is not valid yet")
        if now >= claims.expires:
            raise TokenError("the token has expired")
        return claims


def _reference(reference: Reference) -> dict[str, str]:
    return {"name": reference.name, "uid": reference.uid}


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Strict: the one canonical text of the bytes, so that a token cannot be written in two ways."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if _encode(data) != text:
        raise ValueError("not canonical base64")
    return data
