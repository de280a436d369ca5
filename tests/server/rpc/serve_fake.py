"""A server of its own process, with the fake engine: 10 ms a token. argv[1]: grace in seconds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from doors import doors
from fake_engine import FakeEngine, FakeText

from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import serve_until_signal


async def main() -> int:
    engine = FakeEngine(step_seconds=0.01)
    engine.start()
    grace = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    config = RpcConfig(port=0, grace_seconds=grace)
    opened = doors(engine, FakeText(), config, max_queue=1000)
    code = await serve_until_signal(opened, lambda a: print(f"listening on {a[0]}", flush=True))
    engine.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
