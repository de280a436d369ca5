"""Who may import whom, and that no root folder can become a package of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "proto": {"v1", "tgis"},
    "kernels": {"kernels"},
    "adapters": {"adapters", "kernels"},
    "clients": {"clients", "v1"},
    "server": {"server", "adapters", "kernels", "v1", "tgis", "clients"},
}
# inside the server: cli -> doors (rpc, http, tgis) -> service or compress -> routes -> engine ->
# model; config, errors, metrics, recent and log are leaves
SERVER_RANK = {
    "__main__": 7,
    "cli": 6,
    "rpc": 5,
    "http": 5,
    "tgis": 5,
    "service": 4,
    "compress": 4,
    "routes": 3,
    "engine": 2,
    "model": 1,
    "ledger": 1,
    "packing": 0,
    "state": 0,
    "confined": 0,
    "experiments": 0,
    "identity": 0,
}
LEAVES = {"called", "config", "errors", "metrics", "recent", "log", "progress"}
# only kernels may use Triton; the wire and the clients must do without torch
FORBIDDEN = {
    "proto": {"torch", "transformers", "triton"},
    "clients": {"torch", "transformers", "triton", "safetensors"},
    "adapters": {"transformers", "triton", "peft", "grpc"},
    "kernels": {"transformers", "peft", "grpc", "safetensors"},
    "server": {"triton", "peft"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(root: str) -> list[Path]:
    return sorted((ROOT / root).rglob("*.py"))


@pytest.mark.parametrize("root", ALLOWED)
def test_imports_go_one_way(root: str) -> None:
    assert sources(root)
    for path in sources(root):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "deltaserve" and len(parts) > 1:
                assert parts[1] in ALLOWED[root], f"{path} imports {name}"
            assert parts[0] not in FORBIDDEN[root], f"{path} imports {name}"


def test_the_server_imports_downward() -> None:
    base = ROOT / "server" / "deltaserve" / "server"
    for path in sources("server"):
        here = path.relative_to(base).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] != ["deltaserve", "server"] or len(parts) < 3:
                continue
            there = parts[2]
            if there == here or there in LEAVES:
                continue
            assert here not in LEAVES or there == "engine", f"{path} imports {name}"
            if here in SERVER_RANK and there in SERVER_RANK:
                assert SERVER_RANK[there] < SERVER_RANK[here], f"{path} imports {name}"


def test_clients_are_imported_only_by_the_command_line() -> None:
    for path in sources("server"):
        if any(n.startswith("deltaserve.clients") for n in imports(path)):
            assert path.parent.name == "cli" or path.name == "__main__.py", path


@pytest.mark.parametrize("root", ALLOWED)
def test_no_root_folder_is_a_package(root: str) -> None:
    assert not list((ROOT / root).glob("*.py"))
    assert not (ROOT / root / "deltaserve" / "__init__.py").exists()
