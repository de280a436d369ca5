"""What an operator should know of a door that others can reach."""

from __future__ import annotations

import ipaddress


def dangers(host: str, *, closed: bool, certified: bool, encrypted: bool) -> list[str]:
    """Sentences; none on the loopback. closed: nobody is let in without a key. certified: nor
    without a client certificate. encrypted: by TLS."""
    if loopback(host):
        return []
    found = []
    if not closed and not certified:
        found.append(
            f"EVERYBODY who reaches {host} may load adapters, read and change everything: there "
            "are no API keys. Make one with `deltaserve keys create`, ask for client certificates "
            "with --tls-client-ca, or listen on --host 127.0.0.1"
        )
    if closed and not encrypted:
        found.append(
            f"API keys, prompts and answers go over the network to {host} in plain text: give "
            "--tls-certificate and --tls-key, or put a proxy with TLS before it"
        )
    return found


def loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("unix:")
