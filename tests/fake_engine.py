"""An engine without a model, for tests of the wire: tokens follow from the prompt alone."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import NoReturn

from deltaserve.adapters import errors as adapter_errors
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.server.called import parse
from deltaserve.server.engine.chat import Chat
from deltaserve.server.engine.constraint import Constraint
from deltaserve.server.engine.core import (
    AdapterInfo,
    AdapterRef,
    AdapterState,
    FinishReason,
    Outbox,
    Output,
    Request,
    ServedAdapter,
    Tier,
    Timings,
    TokenLogprob,
    Usage,
)
from deltaserve.server.engine.group import located
from deltaserve.server.engine.kv_pool import KVShape
from deltaserve.server.engine.plan import Fit, MemoryPlan
from deltaserve.server.engine.stats import EngineInfo, EngineStats
from deltaserve.server.engine.validate import Limits, check
from deltaserve.server.errors import (
    AdapterConflict,
    AdapterUnknown,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestError,
    ShuttingDown,
)

VOCAB = 300
BOS, AB = 1, 2  # "ab" is one token
LIMITS = Limits(vocab_size=VOCAB, max_length=4096, kv_tokens=1 << 20)


def token_id(prompt: tuple[int, ...], i: int) -> int:
    """What the fake model says at place i."""
    return 3 + (sum(prompt) + 5 * i) % 250


PLAN = MemoryPlan(
    weights=123,
    free=10_000,
    step=100,
    budget=8000,
    shape=KVShape(block_size=16, block=160, extent=1),
    blocks=10,
    kv_most=1760,
    kv_floor=800,
    adapter_most=7200,
    max_length=LIMITS.max_length,
    fits=(Fit("LoRA r16", 300, 24, 160),),
)


class NoGrammars:
    def close(self) -> None: ...

    def matchers(self, constraint: Constraint, count: int) -> NoReturn:
        field = f"constraint.{constraint.kind}"
        raise InvalidRequest(f"{field}: the fake text has no grammars", field=field)


class FakeText:
    """Bytes shifted by 3; "ab" is one token; begins with BOS."""

    vocab_size = VOCAB
    backend = None
    trusted = True
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        out, data = [BOS], text.encode()
        i = 0
        while i < len(data):
            pair = data[i : i + 2] == b"ab"
            out.append(AB if pair else data[i] + 3)
            i += 2 if pair else 1
        return out

    def grammars(self, vocabulary: int, eos: tuple[int, ...]) -> NoGrammars:
        return NoGrammars()

    def tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [(0, 0), *((i, i + 1) for i in range(len(text)))]  # of ASCII without "ab"

    def chat(self, chat: Chat) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}" for m in chat.messages)
        return self.encode(text + "<assistant>" * chat.add_generation_prompt)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        parts = {BOS: b"" if skip_special_tokens else b"<s>", AB: b"ab", 0: b""}
        data = b"".join(parts[i] if i in parts else bytes([i - 3]) for i in ids)
        return data.decode("utf-8", "replace")


class FakeAdapters:
    """Every folder is an adapter, but for names of errors: ``malformed:...`` and so on."""

    def __init__(self) -> None:
        self._infos: dict[str, AdapterInfo] = {}
        self._watchers: list[Callable[[AdapterInfo], None]] = []
        self._lock = threading.RLock()
        self.in_flight: dict[str, int] = defaultdict(int)
        self.load_seconds = 0.0

    def load(
        self,
        name: str,
        uri: str,
        *,
        pinned: bool = False,
        options: LoadOptions = DEFAULT,
        register_only: bool = False,
    ) -> Future[AdapterInfo]:
        future: Future[AdapterInfo] = Future()
        kind, _, _ = uri.partition(":")
        with self._lock:
            if options.parent and options.parent not in self._infos:
                text = f"no adapter named {options.parent!r} is registered"
                raise AdapterUnknown(text, field="options.parent")
            known = self._infos.get(name)
            if known is not None and known.digest != f"digest-of-{uri}":
                raise AdapterConflict(f"{name!r} has other content", field="name")
            if known is not None:
                future.set_result(known)
                return future
            if hasattr(adapter_errors, kind):
                error = getattr(adapter_errors, kind)(f"{uri}: refused", field="some.tensor")
                future.set_exception(error)
                return future
            if kind == "bug":
                future.set_exception(ZeroDivisionError("a secret"))
                return future
            self._put(info(name, uri, AdapterState.LOADING, pinned, options))
        if register_only:
            self._put(replace(self._infos[name], state=AdapterState.REGISTERED, tier=Tier.DISK))
            future.set_result(self._infos[name])
            return future
        threading.Timer(self.load_seconds, self._ready, (name, future)).start()
        return future

    def _ready(self, name: str, future: Future[AdapterInfo]) -> None:
        with self._lock:
            self._put(replace(self._infos[name], state=AdapterState.READY, resident_bytes=1000))
        future.set_result(self._infos[name])

    def own_text(self, called: str) -> Future[None]:
        done: Future[None] = Future()
        self.resolve(called)
        done.set_result(None)
        return done

    def unload(self, name: str) -> Future[int]:
        future: Future[int] = Future()
        self._put(replace(self.get(name), state=AdapterState.UNLOADING))
        threading.Thread(target=self._drain, args=(name, future), daemon=True).start()
        return future

    def _drain(self, name: str, future: Future[int]) -> None:
        while self.in_flight[name]:
            time.sleep(0.005)
        with self._lock:
            gone = self._infos.pop(name)
        self._tell(replace(gone, state=AdapterState.UNLOADED))
        future.set_result(gone.resident_bytes)

    def get(self, name: str) -> AdapterInfo:
        with self._lock:
            if name not in self._infos:
                raise AdapterUnknown(f"no adapter named {name!r} is registered", field="name")
            return self._infos[name]

    def resolve(self, called: str) -> None:
        """As `Registry.resolve`."""
        name, digest = parse(called, "model")
        if name not in self._infos:
            raise AdapterUnknown(f"no adapter named {name!r} is registered", field="model")
        known = self._infos[name]
        if known.state is AdapterState.UNLOADING:
            raise AdapterUnknown(f"{name!r} is being unloaded", field="model")
        if not known.digest.startswith(digest):
            raise AdapterUnknown(f"{name!r} has digest {known.digest}", field="model")

    def list(self) -> list[AdapterInfo]:
        with self._lock:
            return [v for _, v in sorted(self._infos.items())]

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        self._put(replace(self.get(name), pinned=pinned))
        return self.get(name)

    def subscribe(self, callback: Callable[[AdapterInfo], None]) -> Callable[[], None]:
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def _put(self, value: AdapterInfo) -> None:
        with self._lock:
            self._infos[value.name] = value
        self._tell(value)

    def _tell(self, value: AdapterInfo) -> None:
        for watcher in list(self._watchers):
            watcher(value)


def info(
    name: str, uri: str, state: AdapterState, pinned: bool, options: LoadOptions
) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        digest=f"digest-of-{uri}",
        uri=uri,
        state=state,
        tier=Tier.HOST,
        format="fake",
        primitives=("LowRank",),
        resident_bytes=0,
        source_bytes=500,
        pinned=pinned,
        in_flight=0,
        loads=1,
        last_used=0.0,
        loaded_at=1_700_000_000.25,
        load_seconds=0.125,
        notes=("a note", *([repr(options)] if options != DEFAULT else [])),
        parent=options.parent,
    )


class FakeEngine:
    """One token per request and step. fail: raise this in submit; break_with: the error of the
    last output. waiting: that stats tell of. max_queue, names: as the real one."""

    def __init__(
        self,
        step_seconds: float = 0.001,
        max_queue: int = 100_000,
        names: tuple[str, ...] = ("fake-base",),
    ) -> None:
        self.names = names
        self.adapters = FakeAdapters()
        self.step_seconds = step_seconds
        self.max_queue = max_queue
        self.fail: Exception | None = None
        self.break_with: RequestError | None = None
        self.waiting = 0
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Request, Outbox, int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, outbox: Outbox) -> None:
        if self.fail is not None:
            raise self.fail
        check(request, LIMITS)
        members = request.combination.members if request.combination is not None else ()
        for i, one in enumerate((request, *members)):
            with located(i - 1, request):
                for ref in one.adapters:
                    self.adapters.resolve(ref.name)
        with self._lock:
            if len(self._running) >= self.max_queue:
                raise Overloaded("the queue is full", reason="queue_full", retry_after=1.5)
            for ref in request.adapters:
                self.adapters.in_flight[ref.name.partition("@")[0]] += 1
            self.submitted.append(request)
            self._running[request.request_id] = (request, outbox, 0, time.monotonic())

    def when_dead(self, tell: Callable[[], None]) -> None:
        """It never is."""

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancelled.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=self.waiting,
            kv_blocks_total=10,
            kv_blocks_used=4,
            kv_block_size=16,
            kv_blocks_idle=2,
            kv_bytes=960,
        )

    def info(self) -> EngineInfo:
        return EngineInfo(
            base=self.names[0],
            names=self.names,
            folder="fake-folder",
            architecture="FakeForCausalLM",
            fingerprint="f" * 64,
            held_fingerprint="e" * 64,
            quantization="none",
            dtype="float32",
            device="cpu",
            max_length=LIMITS.max_length,
            vocab_size=VOCAB,
            formats=("fake",),
            memory=PLAN,
        )

    def shutdown(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def _loop(self) -> None:
        while not self._stop.wait(self.step_seconds):
            self._step()
        with self._lock:
            entries = list(self._running.values())
            self._running.clear()
        for request, outbox, _, _ in entries:
            outbox.deliver([failed(request, ShuttingDown("the server is shutting down"))])

    def _step(self) -> None:
        outputs: dict[Outbox, list[Output]] = defaultdict(list)
        with self._lock:
            cancelled = set(self.cancelled)
            for key, (request, outbox, done, since) in list(self._running.items()):
                output = self._next(request, done, since, cancelled)
                outputs[outbox].append(output)
                self._running[key] = (request, outbox, done + 1, since)
                if output.finish_reason is not None:
                    del self._running[key]
                    for ref in request.adapters:
                        self.adapters.in_flight[ref.name.partition("@")[0]] -= 1
        for outbox, found in outputs.items():
            outbox.deliver(found)

    def _next(self, request: Request, done: int, since: float, cancelled: set[str]) -> Output:
        p = request.sampling
        if request.request_id in cancelled:
            return failed(request, Cancelled("cancelled"))
        if request.deadline is not None and time.monotonic() > request.deadline:
            return failed(request, DeadlineExceeded("the request's deadline has passed"))
        last = done + 1 >= p.max_tokens
        if last and self.break_with is not None:
            return failed(request, self.break_with)
        seconds = time.monotonic() - since
        scored = p.max_tokens == 0
        token = token_id(request.prompt_ids, done)
        return Output(
            request.request_id,
            text="" if scored else FakeText().decode([token]),
            token_ids=() if scored else (token,),
            logprobs=(logprob(token, p.logprobs, p.ranks),)
            if p.logprobs is not None and not scored
            else (),
            prompt_logprobs=tuple(
                logprob(t, p.prompt_logprobs, p.ranks) for t in request.prompt_ids[p.score_from :]
            )
            if p.score_from is not None and not done
            else (),
            served_by=tuple(self._served(ref) for ref in request.adapters),
            finish_reason=FinishReason.LENGTH if last else None,
            usage=_usage(request, done + 1) if last else None,
            timings=Timings(0.0, 0.0, seconds / 2, seconds) if last else None,
        )

    def _served(self, ref: AdapterRef) -> ServedAdapter:
        info = self.adapters.get(ref.name.partition("@")[0])
        return ServedAdapter(info.name, info.digest, ref.strength, ref.modules)


def _usage(request: Request, done: int) -> Usage:
    """Three drafts, two of them right, if there may be any."""
    speculates = bool(request.speculation.draft_tokens)
    return Usage(len(request.prompt_ids), done, 1, 0, 3 * speculates, 2 * speculates)


def logprob(token: int, top: int, rank: bool) -> TokenLogprob:
    """Even tokens are the best ones at their place."""
    best = token if token % 2 == 0 else token + 1
    tops = tuple((best + i, -0.5 - i) for i in range(top))
    return TokenLogprob(token, -token / 128, tops, 1 + token % 2 if rank else 0)


def failed(request: Request, error: RequestError) -> Output:
    reason = FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR
    return Output(request.request_id, finish_reason=reason, error=error)
