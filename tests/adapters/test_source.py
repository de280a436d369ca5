"""Which uris lead to a path, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deltaserve.adapters.errors import AdapterNotFound, InvalidAdapter, SourceForbidden
from deltaserve.adapters.source import resolve


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "a b"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"secret")
    return tmp_path / "root"


def test_paths_and_file_uris(root: Path) -> None:
    wanted = root / "a b"
    for uri in (str(wanted), "a b", "./x/../a b", (wanted).as_uri(), f"{wanted}/"):
        assert resolve(uri, [root]) == wanted
    assert resolve(str(wanted)) == wanted
    assert resolve(f"{wanted}/model.safetensors", [root]).name == "model.safetensors"
    assert resolve("a b", [root], max_bytes=8) == wanted


@pytest.mark.parametrize(
    "uri",
    [
        "../secret",
        "a b/../../secret/key",
        "/etc",
        "/",
        "..",
        "file:///etc",
        "file://elsewhere/a",
        "https://example.com/x",
        "hf://org/name",
        "s3://bucket/x",
        "FTP:x",
        "",
        "a\0b",
        "file:///%00",
        "file:///a?b=c",
    ],
)
def test_refused(root: Path, uri: str) -> None:
    with pytest.raises(SourceForbidden):
        resolve(uri, [root])


def test_remote_schemes_are_told_what_is_supported(root: Path) -> None:
    with pytest.raises(SourceForbidden, match=r"supported: a path, or file:///path"):
        resolve("hf://org/name")


def test_a_sibling_with_the_same_start_is_outside(root: Path) -> None:
    (root.parent / "root-other").mkdir()
    with pytest.raises(SourceForbidden, match="outside"):
        resolve(str(root.parent / "root-other"), [root])


def test_links_are_followed_before_the_check(root: Path) -> None:
    (root / "way-out").symlink_to(root.parent / "secret")
    (root / "way-in").symlink_to(root / "a b")
    with pytest.raises(SourceForbidden, match="outside"):
        resolve("way-out", [root])
    with pytest.raises(SourceForbidden, match="outside"):
        resolve("way-out/key", [root])
    assert resolve("way-in", [root]) == root / "a b"


def test_a_file_inside_that_links_outside(root: Path) -> None:
    (root / "a b" / "adapter_config.json").symlink_to(root.parent / "secret" / "key")
    with pytest.raises(SourceForbidden, match="outside"):
        resolve("a b", [root])


def test_missing_dangling_and_looping(root: Path) -> None:
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    for name in ("missing", "dangling"):
        with pytest.raises(AdapterNotFound):
            resolve(name, [root])
    with pytest.raises((AdapterNotFound, SourceForbidden)):
        resolve("loop", [root])


def test_fifo_and_device(root: Path) -> None:
    os.mkfifo(root / "a b" / "pipe")
    with pytest.raises(SourceForbidden, match="'pipe' is not a plain file"):
        resolve("a b", [root])
    with pytest.raises(SourceForbidden, match="not a plain file"):
        resolve("/dev/zero")


def test_too_large(root: Path) -> None:
    with pytest.raises(InvalidAdapter, match="8 bytes; at most 7"):
        resolve("a b", [root], max_bytes=7)
