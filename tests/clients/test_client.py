"""The blocking client, the commands, and what importing them brings in."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeText, token_id
from served import served
from typer.testing import CliRunner

from deltaserve.clients import Client, errors
from deltaserve.clients.cli import app


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server in a thread of its own."""
    found: list[str] = []
    up = threading.Event()
    loop = asyncio.new_event_loop()
    down = asyncio.Event()

    async def serve() -> None:
        async with served() as s:
            found.append(s.address)
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert up.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(down.set)
    thread.join(10)


def run(address: str, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--address", address])
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_blocking_client(address: str) -> None:
    with Client(address) as client:
        client.wait_ready(5)
        assert client.server_info().base == "fake-base"
        assert client.load_adapter("a", "/a", pinned=True).state == "ready"
        answer = client.generate([4, 5], "a", max_tokens=7, logprobs=True)
        assert answer.token_ids == [token_id((4, 5), i) for i in range(7)]
        assert answer.logprobs == [pytest.approx(-t / 128) for t in answer.token_ids]
        assert answer.served_by.adapters[0].name == "a"
        pieces = list(client.stream([4, 5], adapters=["a", ("b", 0.5)][:1], max_tokens=7))
        assert "".join(map(str, pieces)) == str(answer)
        assert client.score("x", ["!"])[0].token_ids == [ord("!") + 3]
        assert client.detokenize(client.tokenize("hé")) == "<s>hé"
        assert next(client.watch_adapters()).adapters[0].name == "a"
        assert not client.pin_adapter("a", False).pinned
        assert [x.name for x in client.list_adapters()] == ["a"] == [client.get_adapter("a").name]
        assert client.unload_adapter("a") == 1000


def test_options_of_loads_and_modules_of_adapters(address: str) -> None:
    with Client(address) as client:
        client.load_adapter("up", "/up")
        loaded = client.load_adapter(
            "down", "/down", parent="up", task_id=0, max_error=0.25, allow_base_mismatch=True
        )
        assert loaded.parent == "up" and "task_id=0, max_error=0.25" in loaded.notes[1]
        with pytest.raises(TypeError, match="'parnt'"):
            client.load_adapter("x", "/x", parnt="up")  # type: ignore[call-arg]
        with pytest.raises(errors.InvalidArgument):
            client.load_adapter("x", "/x", task_id=-1)
        adapters = ["up", {"name": "down", "strength": 0.5, "modules": ["*.q_proj", "lm_head"]}]
        served = client.generate([4], adapters=adapters).served_by.adapters
        assert [(s.name, s.strength, s.modules) for s in served] == [
            ("up", 1.0, ()),
            ("down", 0.5, ("*.q_proj", "lm_head")),
        ]
        for wrong in ({"name": "up", "modules": "*"}, {"strength": 1.0}, {"name": "up", "x": 1}):
            with pytest.raises(TypeError, match="give name, strength and a list of modules"):
                client.generate([4], adapters=[wrong])
        with pytest.raises(errors.InvalidArgument) as caught:
            client.generate([4], adapters=[{"name": "up", "modules": [""]}])
        assert caught.value.field == "adapters.modules"
        for name in ("up", "down"):
            client.unload_adapter(name)


def test_threads_share_a_client(address: str) -> None:
    with Client(address) as client:
        found: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            found[i] = client.generate([i + 3], max_tokens=20).token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: [token_id((i + 3,), k) for k in range(20)] for i in range(16)}


def test_errors_are_typed(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(errors.InvalidArgument) as caught:
            client.generate("x", temperature=float("nan"))
        assert caught.value.field == "sampling.temperature"
        with pytest.raises(errors.NotFound):
            client.generate("x", "nobody")
        with pytest.raises(errors.DeadlineExceeded):
            list(client.stream("x", max_tokens=4000, timeout=0.1))
        with pytest.raises(TypeError, match="tempratur"):
            client.generate("x", tempratur=1.0)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="list of names"):
            client.generate("x", adapters="a")
    with Client("127.0.0.1:1") as client:
        with pytest.raises(errors.Unavailable):
            client.generate("x")
        with pytest.raises(errors.Unavailable, match="not ready after"):
            client.wait_ready(0.3)


def test_generate_command(address: str) -> None:
    ids = FakeText().encode("hello")
    text = "".join(FakeText().decode([token_id(tuple(ids), i)]) for i in range(6))
    assert run(address, "generate", "hello", "--max-tokens", "6") == text + "\n"
    assert run(address, "generate", "hello", "--max-tokens", "6", "--no-stream") == text + "\n"
    found = json.loads(run(address, "generate", "hello", "--max-tokens", "6", "--json"))
    assert found["text"] == text and found["served_by"]["base"] == "fake-base"
    refused = CliRunner().invoke(
        app, ["generate", "hello", "--model", "nobody", "--address", address]
    )
    assert refused.exit_code == 1
    assert "NOT_FOUND" in refused.stderr and "nobody" in refused.stderr and not refused.stdout


def test_adapter_commands(address: str) -> None:
    assert json.loads(run(address, "adapters", "load", "c", "/c", "--json"))["state"] == "ready"
    assert run(address, "adapters", "pin", "c").startswith("c  ready")
    assert json.loads(run(address, "adapters", "list", "--json"))["pinned"]
    assert "c (pinned)" in run(address, "adapters", "list")
    assert "c  ready" in run(address, "adapters", "watch", "--timeout", "0.3")
    found = json.loads(run(address, "generate", "x", "--adapter", "c=0.25", "--json"))
    assert found["served_by"]["adapters"][0]["strength"] == 0.25
    masked = ["--adapter", "c", "--modules", "c=*.q_proj", "--modules", "c=*.v_proj"]
    found = json.loads(run(address, "generate", "x", *masked, "--json"))
    assert found["served_by"]["adapters"][0]["modules"] == ["*.q_proj", "*.v_proj"]
    run(address, "generate", "x", "--adapter", "c", "--modules", "d=*", code=2)
    child = json.loads(run(address, "adapters", "load", "d", "/d", "--parent", "c", "--json"))
    assert child["parent"] == "c"
    run(address, "adapters", "unload", "d")
    assert run(address, "adapters", "unload", "c") == "1000 B freed\n"
    run(address, "adapters", "unload", "c", code=1)


def test_info_and_health_commands(address: str) -> None:
    assert "fake-base" in run(address, "info")
    assert json.loads(run(address, "info", "--json"))["vocab_size"] == 300
    assert run(address, "health") == "serving\n"
    run("127.0.0.1:1", "health", code=1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        [*request.split(), names, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    async with served(tls_key=key, tls_certificate=certificate) as s:
        arguments = ["health", "--address", s.address]
        trusted = await asyncio.to_thread(
            CliRunner().invoke, app, [*arguments, "--ca", str(certificate)]
        )
        assert (trusted.exit_code, trusted.stdout) == (0, "serving\n"), trusted.stderr
        plain = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert plain.exit_code == 1 and "UNAVAILABLE" in plain.stderr
        missing = CliRunner().invoke(app, [*arguments, "--ca", str(tmp_path / "no.pem")])
        assert missing.exit_code == 2 and "--ca" in missing.stderr


@pytest.mark.parametrize("module", ["deltaserve.clients", "deltaserve.clients.cli"])
def test_the_client_brings_neither_torch_nor_the_server(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'triton') "
        "or m.startswith(('deltaserve.server', 'deltaserve.adapters', 'deltaserve.kernels'))]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_client_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltaserve.clients", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "adapters" in done.stdout


def test_the_commands_of_routes(address: str, tmp_path: Path) -> None:
    run(address, "adapters", "load", "routed", "/routed")
    arms = ["--arm", "base=", "--arm", "tuned=routed", "--weight", "tuned=3"]
    text = run(address, "routes", "put", "r", *arms)
    assert "r  active  base 25.0%, tuned 75.0%" in text and "base  (control)  base" in text
    ramp = [{"after": 0, "weights": {"a": 1, "b": 0}}, {"after": 9.5, "weights": {"a": 0, "b": 1}}]
    shape = {
        "arms": [
            {"name": "a", "weight": 0},
            {"name": "b", "adapters": [{"name": "routed", "strength": 0.5}]},
            {"name": "s", "model": "routed", "shadow": 0.5, "stop": {"max_tokens": 3}},
        ],
        "control": "b",
        "ramp": {"points": ramp, "shape": "linear", "gated": True},
        "guardrails": [{"metric": "slow", "tolerated": 0.01, "seconds": 2.5}],
        "layer": {"name": "l", "start": 0.25, "end": 1.0},
    }
    file = tmp_path / "route.json"
    file.write_text(json.dumps(shape))
    first = json.loads(run(address, "routes", "put", "r", "--file", str(file), "--json"))
    for field in ("ramp", "guardrails", "layer", "control"):
        assert first[field] == shape[field]
    assert [(a["name"], a["weight"], a["shadow"]) for a in first["arms"]] == [
        ("a", 0, 0),
        ("b", 1, 0),
        ("s", 0, 0.5),
    ]
    file.write_text(run(address, "routes", "get", "r", "--json"))
    given = ["--file", str(file), "--json", "--etag", first["etag"]]
    again = json.loads(run(address, "routes", "put", "r", *given))
    assert again.pop("etag") != first.pop("etag")
    for moving in ("update_time", "weights"):
        del again[moving], first[moving]
    assert again == first
    shown = run(address, "routes", "get", "r")
    assert "s in the shadow of 50%" in shown and "routed x 0.5  digest-of-/r" in shown
    assert "r" in run(address, "routes", "list")
    rolled = run(address, "routes", "roll-back", "r", "--reason", "it shouts")
    assert "rolled_back  it shouts" in rolled
    assert run(address, "routes", "delete", "r") == "r is deleted\n"
    run(address, "routes", "get", "r", code=1)
    run(address, "routes", "put", "r", code=2)
    file.write_text('{"arms": [{"nam": "x"}]}')
    run(address, "routes", "put", "r", "--file", str(file), code=1)
