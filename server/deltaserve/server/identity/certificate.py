"""The names in a client certificate, as keys have them: ``KIND:NAME``, compared as they are.

``dns:``, ``uri:``, ``email:`` and ``ip:`` are subject alternative names; ``subject:`` is the whole
subject by RFC 2253, as `openssl x509 -nameopt RFC2253` prints it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

KINDS = ("subject", "dns", "uri", "email", "ip")
FORM = "KIND:NAME, where KIND is one of " + ", ".join(KINDS)

_OF_SSL = {"DNS": "dns", "URI": "uri", "email": "email", "IP Address": "ip"}
_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "emailAddress",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "serialNumber": "serialNumber",
    "stateOrProvinceName": "ST",
    "streetAddress": "street",
    "userId": "UID",
}


def is_subject(text: str) -> bool:
    """Whether a key may stand for that name."""
    kind, sign, name = text.partition(":")
    return bool(sign and name) and kind in KINDS and text.isprintable() and len(text) <= 512


def subjects(found: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """(kind, name) of a certificate -> what keys are looked up by."""
    return tuple(f"{kind}:{_plain(kind, name)}" for kind, name in found if name)


def from_ssl(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Of what `ssl.SSLSocket.getpeercert` gives."""
    if not certificate:
        return ()
    names = [(_OF_SSL[k], v) for k, v in certificate.get("subjectAltName", ()) if k in _OF_SSL]
    return subjects([("subject", _rfc2253(certificate.get("subject", ()))), *names])


def _plain(kind: str, name: str) -> str:
    if kind != "ip":
        return name
    try:
        return str(ipaddress.ip_address(name.strip()))
    except ValueError:
        return name


def _rfc2253(subject: Iterable[Iterable[tuple[str, str]]]) -> str:
    """Last part first; empty if an attribute has no short name here."""
    parts = []
    for names in subject:
        named = list(names)
        if any(kind not in _SHORT for kind, _ in named):
            return ""
        parts.append("+".join(f"{_SHORT[kind]}={_escaped(value)}" for kind, value in named))
    return ",".join(reversed(parts))


def _escaped(value: str) -> str:
    out = []
    for i, character in enumerate(value):
        edge = (i == 0 and character in " #") or (i == len(value) - 1 and character == " ")
        if character in ',+"\\<>;' or edge:
            out.append("\\" + character)
        elif " " <= character <= "~":
            out.append(character)
        else:
            out.append("".join(f"\\{byte:02X}" for byte in character.encode()))
    return "".join(out)
