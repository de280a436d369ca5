"""`deltaserve serve` as a process, with a real model: start, serve, drain, refuse."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dashboards
import openai
import pytest
import torch
from typer.testing import CliRunner
from variants import VARIANTS, logits_of, make_base, make_tokenizer, open_base

from deltaserve.clients import Client, errors
from deltaserve.server import run
from deltaserve.server.cli import app

SMALL = ["--kv-cache-bytes", "16MiB", "--threads", "1", "--port", "0"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deltaserve.server", "serve", *map(str, arguments)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    make_base(root / "base", "llama")
    for i, name in enumerate(("lora", "ia3")):
        generator = torch.Generator().manual_seed(i)
        VARIANTS[name].make(root / "base", root / "adapters" / name, generator)
    shutil.copytree(root / "adapters" / "ia3", root / "many" / "tuned")
    shutil.copytree(root / "adapters" / "ia3", root / "many" / "torn")
    torn = root / "many" / "torn" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    return root


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    process = subprocess.Popen(
        command(
            *("--base", files / "base", "--adapter", f"first={files / 'adapters' / 'lora'}"),
            *("--adapter-root", files / "adapters", "--metrics-port", 0, *SMALL),
            *("--http-port", 0, "--served-model-name", "team/tiny", "--served-model-name", "tiny"),
            *("--adapter-dir", files / "many"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    threading.Thread(target=lambda e=process.stderr: log.extend(e), daemon=True).start()
    line = process.stdout.readline()
    assert line.startswith("listening on 127.0.0.1:"), log
    yield process, line.removeprefix("listening on ").strip(), log
    process.kill()
    process.wait()


def reference(files: Path, adapter: str, prompt: list[int]) -> torch.Tensor:
    model = VARIANTS[adapter].reference(open_base(files / "base"), files / "adapters" / adapter)
    return logits_of(model, prompt).log_softmax(-1)


def test_the_preloaded_adapter_answers_as_peft_does(files: Path, server: tuple) -> None:  # type: ignore[type-arg]
    with Client(server[1]) as client:
        client.wait_ready(1)
        prompt = make_tokenizer()("an odd prompt").input_ids
        assert client.tokenize("an odd prompt") == prompt
        answer = client.generate("an odd prompt", "first", max_tokens=8, logprobs=2)
        score = client.score(prompt, [answer.token_ids], "first")[0]
    expected = reference(files, "lora", prompt + answer.token_ids)[len(prompt) - 1 : -1]
    assert expected.argmax(-1).tolist() == answer.token_ids
    chosen = expected[range(len(answer.token_ids)), answer.token_ids].tolist()
    assert answer.logprobs == pytest.approx(chosen, abs=1e-3)
    assert score.logprobs == pytest.approx(chosen, abs=1e-3) and score.greedy
    assert answer.top_logprobs is not None and len(answer.top_logprobs[0]) == 2


def test_openais_api_is_where_the_log_says(files: Path, server: tuple) -> None:  # type: ignore[type-arg]
    found = re.findall(r"OpenAI's API on (http://127\.0\.0\.1:\d+/v1)", "".join(server[2]))
    assert len(found) == 1
    with openai.OpenAI(base_url=found[0], api_key="none", max_retries=0) as http:
        models = {m.id: m.model_extra or {} for m in http.models.list()}
        assert "first" in models and models["first"]["parent"] == "team/tiny"
        assert models["tiny"]["root"] == str(files / "base") not in models
        assert http.completions.create(model="tiny", prompt="x").model == "team/tiny"
        answer = http.completions.create(model="first", prompt="an odd prompt", temperature=0)
    with Client(server[1]) as client:
        assert client.generate("an odd prompt", "first", max_tokens=16).text == (
            answer.choices[0].text
        )


def test_adapters_over_the_wire(files: Path, server: tuple) -> None:  # type: ignore[type-arg]
    with Client(server[1]) as client:
        loaded = client.load_adapter("second", str(files / "adapters" / "ia3"))
        assert (loaded.state, loaded.format) == ("ready", "peft-ia3") and loaded.resident_bytes > 0
        both = client.generate("x", adapters=["first", ("second", 0.5)], max_tokens=3)
        assert [a.strength for a in both.served_by.adapters] == [1.0, 0.5]
        digest = client.get_adapter("second").digest
        assert client.generate("x", f"second@{digest[:8]}", max_tokens=1).token_ids
        with pytest.raises(errors.NotFound):
            client.generate("x", "second@00000000", max_tokens=1)
        with pytest.raises(errors.AlreadyExists):
            client.load_adapter("second", str(files / "adapters" / "lora"))
        for forbidden in ("/etc", str(files / "base"), "../base"):
            with pytest.raises(errors.PermissionDenied):
                client.load_adapter("third", forbidden)
        with pytest.raises(errors.NotFound):
            client.load_adapter("third", str(files / "adapters" / "nowhere"))
        with pytest.raises(errors.InvalidArgument, match="chat template"):
            client.generate([{"role": "user", "content": "hi"}])
        assert client.unload_adapter("second") == loaded.resident_bytes


def test_a_folder_of_adapters(files: Path, server: tuple) -> None:  # type: ignore[type-arg]
    """Registered lazily under their folders' names; what is damaged is named and left out."""
    log = server[2]
    assert any("registered 1 adapters, left out 1" in line for line in log), log
    assert any("torn is left out" in line and "adapter_model" in line for line in log), log
    with Client(server[1]) as client:
        found = client.get_adapter("tuned")
        assert (found.state, found.tier, found.loads) == ("registered", "disk", 0)
        assert found.format == "peft-ia3" and found.digest and not found.resident_bytes
        prompt = make_tokenizer()("lazily").input_ids
        answer = client.generate(prompt, "tuned", max_tokens=5, ignore_eos=True, logprobs=True)
        assert client.get_adapter("tuned").state == "ready"
        with pytest.raises(errors.NotFound):
            client.get_adapter("torn")
    expected = reference(files, "ia3", prompt + answer.token_ids)[len(prompt) - 1 : -1]
    assert expected.argmax(-1).tolist() == answer.token_ids


def test_metrics_over_http(server: tuple) -> None:  # type: ignore[type-arg]
    url = next(line.split("metrics on ")[1].strip() for line in server[2] if "metrics on" in line)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as reply:
        text = reply.read().decode()
    assert 'deltaserve_completion_tokens_total{adapter="first"} ' in text
    assert "vllm:lora_requests_info{" in text
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M))
    parts = {f"{name}_{part}" for name in types for part in ("bucket", "sum", "count")}
    asked = set().union(*map(dashboards.names, dashboards.expressions()))
    assert len(asked) > 30
    assert asked <= types.keys() | parts, "the dashboard and the alerts name what is scraped"


def test_sigterm_lets_a_stream_finish_and_exits_0(server: tuple) -> None:  # type: ignore[type-arg]
    process, address, log = server
    with Client(address) as client:
        stream = client.stream("x", "first", max_tokens=200, ignore_eos=True)
        got = len(next(stream).token_ids)
        process.send_signal(signal.SIGTERM)
        assert got + sum(len(p.token_ids) for p in stream) == 200
    began = time.monotonic()
    assert process.wait(20) == 0, log
    assert time.monotonic() - began < 10
    assert process.stdout.read() == "" and not any("Traceback" in line for line in log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: "),
        (["--quantize", "int5"], "--quantize int5: "),
        (["--adapter", "a=nowhere"], "--adapter a=nowhere: "),
        (["--adapter-bytes", "much"], "--adapter-bytes much: "),
    ],
)
def test_bad_flags(files: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--base", str(files / "base"), *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"deltaserve: {message}") and done.stderr.count("\n") == 1


def test_a_start_that_fails(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.logs, "set_up", lambda level: None)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    base = str(files / "base")
    for arguments, start in (
        (["--base", base, "--adapter", f"bad={tmp_path}"], f"--adapter bad={tmp_path}: "),
        (["--base", str(tmp_path)], f"--base {tmp_path}: "),
        (["--base", base, "--host", "203.0.113.1"], "--host, --port: cannot listen on"),
    ):
        done = CliRunner().invoke(app, ["serve", *SMALL, *arguments])
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr
        assert f"deltaserve: {start}" in done.stderr and "Traceback" not in done.stderr


def test_inspect(files: Path) -> None:
    folder = str(files / "adapters" / "lora")
    found = json.loads(CliRunner().invoke(app, ["inspect", folder, "--json"]).stdout)
    assert found["format"] == "peft-lora" and found["config"]["peft_type"] == "LORA"
    shown = CliRunner().invoke(app, ["inspect", folder])
    assert shown.exit_code == 0 and "lora_A.weight" in shown.stdout
    assert CliRunner().invoke(app, ["inspect", str(files / "nowhere")]).exit_code == 2
