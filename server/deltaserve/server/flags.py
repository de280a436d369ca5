"""Texts of the command line, as the config has them. A refusal names the flag."""

from __future__ import annotations

import re
from pathlib import Path

from deltaserve.server.config import HTTP_PORT, ConfigError, Patch


def name_and_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` of --adapter."""
    name, path = _pair("--adapter", text, "NAME=PATH")
    return name, Path(path)


def adapters_in(folder: Path) -> list[tuple[str, Path]]:
    """(name, path) of the folders in the folder of --adapter-dir, hidden ones excepted."""
    if not folder.is_dir():
        raise ConfigError(f"--adapter-dir {folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [(path.name, path) for path in found]


def http_port(text: str | None) -> tuple[int | None, bool]:
    """Port of --http-port, and whether it must be had: a number, ``off``, or what holds without."""
    if text is None:
        return HTTP_PORT, False
    if text == "off":
        return None, True
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"--http-port {text}: write a number or off")
    return int(text), True


def child_and_parent(text: str) -> tuple[str, str]:
    """``CHILD=PARENT`` of --parent."""
    return _pair("--parent", text, "CHILD=PARENT")


def cores(flag: str, text: str) -> tuple[int, ...]:
    """Numbers of processors: ``0,3``."""
    parts = text.split(",") if text else []
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(f"{flag} {text}: write processors as 0,3")
    return tuple(int(part) for part in parts)


def task(text: str) -> tuple[str, int]:
    """``NAME=ID`` of --task."""
    name, number = _pair("--task", text, "NAME=ID")
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"--task {text}: the task must be a whole number from 0")
    return name, int(number)


def max_error(text: str) -> tuple[str, float]:
    """``NAME=X`` of --max-error."""
    name, number = _pair("--max-error", text, "NAME=X")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"--max-error {text}: the error must be at least 0 and below 1")
    return name, value


def patch(text: str) -> Patch:
    """``NAME=PATH`` or ``NAME@STRENGTH=PATH`` of --patch."""
    form = "NAME=PATH or NAME@STRENGTH=PATH"
    name, path = _pair("--patch", text, form)
    name, sign, strength = name.partition("@")
    try:
        value = float(strength) if sign else 1.0
    except ValueError:
        raise ConfigError(f"--patch {text}: write it as {form}") from None
    if not abs(value) <= 1000:
        raise ConfigError(f"--patch {text}: the strength must be within ±1000")
    return Patch(name, Path(path), value)


def _pair(flag: str, text: str, form: str) -> tuple[str, str]:
    left, sign, right = text.partition("=")
    if not sign or not left or not right:
        raise ConfigError(f"{flag} {text}: write it as {form}")
    return left, right


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(flag: str, text: str | None) -> int | None:
    """Bytes: a whole number, or one with a unit: ``512MiB``, ``2GB``, ``auto`` for None."""
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not found:
        raise ConfigError(f"{flag} {text}: write bytes as 1000000, 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[found[2] or ""])
