"""SPIFFE URIs: exactly one text for each identity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.model import Identity, IdentityError

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@given(NAMES, NAMES, NAMES)
def test_text_and_back(domain: str, namespace: str, account: str) -> None:
    identity = Identity(domain, namespace, account)
    assert Identity.parse(str(identity)) == identity


@given(st.text(max_size=60))
def test_what_is_taken_is_given_back_unchanged(text: str) -> None:
    uri = f"spiffe://{text}"
    try:
        assert str(Identity.parse(uri)) == uri
    except IdentityError:
        pass


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cluster.local/ns/a/sa/b",
        "https://cluster.local/ns/a/sa/b",
        "SPIFFE://cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local/ns/a/sa/b/c",
        "spiffe://cluster.local/ns//sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://cluster.local/sa/b/ns/a",
        "spiffe://Cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b?x=y",
        "spiffe://cluster.local/ns/a/sa/..",
        "spiffe://cluster.local/ns/a/sa/b\n",
        "spiffe://cluster.local:443/ns/a/sa/b",
        "spiffe://user@cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b%2f",
        f"spiffe://cluster.local/ns/{'a' * 254}/sa/b",
    ],
)
def test_refused(uri: str) -> None:
    with pytest.raises(IdentityError):
        Identity.parse(uri)
