"""The console's files as they are served: what they are built from, and what a browser is told."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest
from served import served

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "clients" / "console"
ASSETS = ROOT / "server" / "deltaserve" / "server" / "http" / "assets"
OF_SOURCES = ("index.html", "package-lock.json", "tsconfig.json", "vite.config.ts", "src")


def digest_of_sources() -> str:
    """As vite.config.ts has it."""
    roots = [SOURCES / name for name in OF_SOURCES]
    found = [f for r in roots for f in ([r] if r.is_file() else r.rglob("*")) if f.is_file()]
    hashed = hashlib.sha256()
    for file in sorted(found, key=lambda f: f.relative_to(SOURCES).as_posix()):
        data = file.read_bytes()
        hashed.update(f"{file.relative_to(SOURCES).as_posix()} {len(data)}\n".encode())
        hashed.update(data)
    return hashed.hexdigest()


def test_the_assets_are_of_these_sources() -> None:
    built = (ASSETS / "sources.sha256").read_text().strip()
    assert built == digest_of_sources(), "run `make console`"


@pytest.mark.skipif(
    shutil.which("npm") is None or not (SOURCES / "node_modules").is_dir(),
    reason="needs node and `npm ci` in clients/console",
)
def test_the_sources_build_the_assets(tmp_path: Path) -> None:
    subprocess.run(
        ["npm", "run", "build"],
        cwd=SOURCES,
        env={**os.environ, "CONSOLE_OUT": str(tmp_path)},
        check=True,
        capture_output=True,
    )
    built = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert built == {f.name: f.read_bytes() for f in ASSETS.iterdir()}, "run `make console`"


def test_the_page_is_small_and_has_no_script_of_its_own() -> None:
    total = sum(f.stat().st_size for f in ASSETS.iterdir())
    assert total < 700_000
    page = (ASSETS / "index.html").read_text()
    assert page.count("<script") == 1 and 'src="./console.js"></script>' in page
    assert "<style" not in page and "http:" not in page and "https:" not in page


async def test_what_a_browser_is_told() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        moved = await client.get("/console")
        assert moved.status_code == 308 and moved.headers["location"] == "console/"
        first = await client.get("/")
        assert first.status_code == 308 and first.headers["location"] == "console/"
        page = await client.get("/console/")
        assert page.content == (ASSETS / "index.html").read_bytes()
        for name in ("console.js", "console.css", "echarts.js"):
            asset = await client.get(f"/console/{name}")
            assert asset.status_code == 200 and asset.content == (ASSETS / name).read_bytes()
            assert asset.headers["cache-control"] == "no-cache"
            policy = asset.headers["content-security-policy"].split("; ")
            assert "default-src 'none'" in policy and "script-src 'self'" in policy
            assert "style-src 'self'" in policy and "frame-ancestors 'none'" in policy
            assert "require-trusted-types-for 'script'" in policy
            assert not [p for p in policy if "unsafe" in p or "http" in p or "*" in p]
            assert asset.headers["x-content-type-options"] == "nosniff"
            same = await client.get(
                f"/console/{name}", headers={"if-none-match": asset.headers["etag"]}
            )
            assert same.status_code == 304 and same.content == b""
        assert page.headers["content-type"].startswith("text/html")
        head = await client.head("/console/console.js")
        assert head.status_code == 200 and head.content == b""


async def test_there_is_nothing_else() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        for path in (
            "/console/nothing.js",
            "/console/sources.sha256",
            "/console/..%2fconnect.py",
            "/console/%2e%2e/connect.py",
            "/console/../connect.py",
            "/console/assets/../../connect.py",
            "/console/%00",
            "/console/" + "a" * 5000,
        ):
            answer = await client.get(path)
            assert answer.status_code == 404, path
            assert b"import" not in answer.content
        assert (await client.post("/console/", json={})).status_code == 405


async def test_there_may_be_none() -> None:
    async with (
        served(http_port=0, console=False) as s,
        httpx.AsyncClient(base_url=s.http) as client,
    ):
        for path in ("/", "/console/"):
            assert (await client.get(path)).status_code == 404
