"""The README's Python runs, and its commands exist; so does the Python of the A/B guide."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaserve.clients import Client

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with the zoo's base, as a process."""
    command = [sys.executable, "-m", "deltaserve.server", "serve", "--port", "0"]
    command += ["--base", str(ROOT / "demo/zoo/base"), "--adapter-root", str(ROOT / "demo/zoo")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()


def test_the_python_runs(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code.replace("127.0.0.1:50051", address), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert shown.startswith("fgi"), "the adapter sorts the letters of fig"
    assert re.search(r"\d+ bytes freed", shown)


def test_the_python_of_the_guide_runs(address: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ab.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    with Client(address) as client:
        for name in ("caesar-lora", "caesar-lora-weak"):
            client.load_adapter(name, name)
        known = {"client": client, "question": "task: fig ="}
        for block in blocks:
            exec(compile(block, "ab.md", "exec"), known)
        (arm,) = (a for a in known["report"].arms if a.rewarded_users)
        assert arm.arm == known["answer"].served_by.arm and arm.reward.value == 1
        assert client.get_route("caesar").weights == {"current": 0, "candidate": 1}


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_flags_exist() -> None:
    commands = {
        ("serve",): re.findall(r"deltaserve serve (.*?)\n\n", README, re.DOTALL),
        ("generate",): re.findall(r"deltaserve generate (.*?)\n", README),
    }
    for command, uses in commands.items():
        asked = [sys.executable, "-m", "deltaserve.server", *command, "--help"]
        known = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        for flag in re.findall(r"--[a-z-]+", " ".join(uses)):
            assert flag in known, (command, flag)
