"""Words that every part shares. Pure.

An *identity* is who a workload is: trust domain, namespace and service account. On the wire it is a SPIFFE URI,
`spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT`, and only exactly that.
"""

import re
from dataclasses import dataclass
from typing import Self

_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)


class IdentityError(ValueError):
    """The text is no identity; says why."""


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """Who a workload is."""

    trust_domain: str
    namespace: str
    service_account: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        """From a SPIFFE URI. Raises IdentityError for anything that `str` would not give back unchanged."""
        if not uri.startswith("spiffe://"):
            raise IdentityError(f"{uri[:300]!r} does not begin with spiffe://")
        parts = uri.removeprefix("spiffe://").split("/")
        if len(parts) != 5 or parts[1] != "ns" or parts[3] != "sa":
            raise IdentityError(f"{uri[:300]!r} is not spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT")
        domain, namespace, account = parts[0], parts[2], parts[4]
        if not _DOMAIN.fullmatch(domain):
            raise IdentityError(f"{uri[:300]!r}: {domain!r} is no trust domain")
        for name in (namespace, account):
            if not _NAME.fullmatch(name):
                raise IdentityError(f"{uri[:300]!r}: {name!r} is no name of Kubernetes")
        return cls(domain, namespace, account)

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @property
    def account(self) -> str:
        """NAMESPACE/SERVICEACCOUNT."""
        return f"{self.namespace}/{self.service_account}"
