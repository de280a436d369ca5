"""Engine: requests in from any thread, one thread that owns the model, outputs out."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from tokenizers import Tokenizer

from deltaserve.kernels.native.openmp import release_workers
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.admission import Admission
from deltaserve.server.engine.alarms import Alarms
from deltaserve.server.engine.backlog import Backlog
from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.core import (
    AdapterRef,
    AdapterState,
    FinishReason,
    Outbox,
    Output,
    Request,
)
from deltaserve.server.engine.group import Reweighting, check_members, check_reweighting
from deltaserve.server.engine.intake import Intake, make_sequence
from deltaserve.server.engine.looks import Looks
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.outcome import StepOutputs, error_output
from deltaserve.server.engine.runner import ModelRunner
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.engine.stats import EngineInfo, EngineStats, engine_stats
from deltaserve.server.engine.validate import Limits
from deltaserve.server.errors import (
    AdapterUnavailable,
    Cancelled,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from deltaserve.server.model.base_model import BaseModel

log = logging.getLogger(__name__)

ARRIVAL = 5e-4
"""Seconds between two looks at what is on its way to a device, while nothing runs: little beside a
load, and long beside a look."""


class Engine:
    """The loop is `step`: take in what came, schedule, run, hand out. Everything that blocks
    (reading adapters, tokenizing, the network) happens on other threads.

    tokenizer: None gives outputs without text. max_wait: of requests that do not say themselves.
    clock: seconds, `time.monotonic` but in tests.
    """

    def __init__(
        self,
        model: BaseModel,
        runner: ModelRunner,
        scheduler: Scheduler,
        adapters: AdapterCache,
        observer: Observer,
        info: EngineInfo,
        *,
        tokenizer: Tokenizer | None,
        backlog: Backlog,
        max_wait: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapters = adapters
        self._runner = runner
        self._scheduler = scheduler
        self._observer = observer
        self._info = info
        self._tokenizer = tokenizer
        self._clock = clock
        self._eos = frozenset(model.eos_token_ids)
        blocks = scheduler.blocks
        self._limits = Limits(
            model.vocab_size,
            model.max_length,
            blocks.total * blocks.block_size,
            blocks.block_size,
            scheduler.max_sequences,
        )
        self._admission = Admission(
            model, adapters, self._limits, info.held_fingerprint, blocks, clock
        )
        self._lock = threading.Condition()
        self._max_wait = max_wait
        self._intake = Intake(backlog, scheduler)
        self._inbox: deque[Sequence | str | Reweighting] = deque()
        self._turned_away: dict[Sequence, Overloaded] = {}
        self._alarms = Alarms(lambda s: self._known.get(s.id) is s)
        self._known: dict[str, Sequence] = {}
        self._steps = 0
        self._draining = False
        self._stopping = False
        self._dead = False
        self._on_death: Callable[[], object] = lambda: None
        self._woken = False
        self._stepping = False
        self._looks = Looks(self.check_integrity)
        self._thread = threading.Thread(target=self._loop, name="deltaserve-engine", daemon=True)
        scheduler.begin = self._admission.begin
        scheduler.withdraw = self._admission.withdraw

    # From any thread:

    def start(self) -> None:
        """Call it on the thread that loaded the base, which is not to compute any more."""
        release_workers()
        self._thread.start()

    def submit(self, request: Request, outbox: Outbox) -> None:
        """Take in a request; what is wrong with it at once is raised, everything later comes as
        an `Output`."""
        if request.max_wait is None:
            request = replace(request, max_wait=self._max_wait)
        check_members(request, self._limits)
        sequence = make_sequence(
            self._admission.patched(request),
            outbox,
            self.adapters,
            self._tokenizer,
            self._scheduler.speculator,
            self._clock(),
        )
        if request.combination is None and len(request.prompt_ids) > self._limits.block_size:
            sequence.sibling = self._known.get(request.sibling)
        try:
            self._enqueue(sequence)
        except RequestError as error:
            for member in sequence.members:
                self.adapters.release(member.adapters, running=False)
            if isinstance(error, Overloaded):
                self._observer.on_shed(error.reason)
            raise

    def set_patches(self, patches: Iterable[AdapterRef]) -> None:
        """Make these loaded adapters part of every request, in this order, before its own. Before
        the first request. InvalidRequest if they cannot be combined."""
        self._admission.set_patches(patches)

    def _enqueue(self, sequence: Sequence) -> None:
        request_id = sequence.id
        with self._lock:
            if self._draining:
                raise ShuttingDown("the server is shutting down and takes no new requests")
            if request_id in self._known:
                raise InvalidRequest(
                    f"request_id: {request_id!r} is in flight; it must be new", field="request_id"
                )
            gone = self._intake.enter(sequence, len(self._known) - len(self._turned_away))
            if gone is not None:
                victim, error = gone
                self._turned_away[victim] = error
                self._inbox.append(victim.id)
            self._known[request_id] = sequence
            self._inbox.append(sequence)
            self._wake_locked()

    def cancel(self, request_id: str) -> None:
        """End a request; its last output says `cancelled`. Nothing happens if it is done."""
        with self._lock:
            if request_id in self._known:
                self._inbox.append(request_id)
                self._wake_locked()

    def set_weights(self, request_id: str, weights: tuple[float, ...]) -> None:
        """Change the weights of a live combination from the next token on. RequestUnknown without
        one, InvalidRequest for other weights than it could have begun with."""
        with self._lock:
            known = self._known.get(request_id)
            check_reweighting(known, weights)
            self._inbox.append(Reweighting(request_id, weights))
            self._wake_locked()

    def stats(self) -> EngineStats:
        return engine_stats(self._scheduler, self.adapters, len(self._inbox), self._steps)

    def info(self) -> EngineInfo:
        return self._info

    def wake(self) -> None:
        """The adapter cache has something to do."""
        with self._lock:
            self._wake_locked()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests and wait for the others. False if some are left at the timeout."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._draining = True
            while self._known or self._stepping:  # what has ended is handed out after its step
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._lock.wait(left)
        return True

    def when_dead(self, tell: Callable[[], object]) -> None:
        """Call it once there can be no more steps, or at once: the process is to be started anew.
        On the engine thread, which has failed all requests and takes no others."""
        with self._lock:
            self._on_death = tell
            dead = self._dead
        if dead:
            tell()

    def shutdown(self) -> None:
        """Stop now; requests in flight fail with ShuttingDown."""
        with self._lock:
            self._draining = self._stopping = True
            self._wake_locked()
        if self._thread.is_alive():
            self._thread.join()
        if not self._dead:
            self.adapters.close()

    # On the engine thread:

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not (self._woken or self._stopping):
                    self._lock.wait(self._patience())
                    if self._scheduler.running or self._scheduler.queue or self.adapters.expecting:
                        break
                self._woken = bool(self._scheduler.running)
                stopping = self._stopping
                self._stepping = not stopping
            if stopping:
                self._abandon()
                return
            try:
                self.step()
            except Exception:  # a bug outside the model's step: nobody may be left waiting for ever
                log.exception("the engine's step failed")
                self._abandon(EngineFailure("the engine failed; see the server's log"))
                if not self._runner.works():
                    self._die()
                    return
            with self._lock:
                self._woken = self._woken or bool(self._scheduler.running)
                self._stepping = False
                if self._draining:
                    self._lock.notify_all()

    def _die(self) -> None:
        """What the server computes with is lost."""
        log.critical("no more steps can be made: the server has to be started anew")
        with self._lock:
            self._draining = self._dead = True
            tell = self._on_death
        self._abandon()  # what has come since
        with self._lock:
            self._stepping = False
            self._lock.notify_all()
        tell()
        self.adapters.close()

    def _patience(self) -> float | None:
        """Seconds to wait for news: what comes to a device has to be asked for, and deadlines of
        waiting requests are looked at now and then."""
        if self.adapters.expecting:
            return ARRIVAL
        return 0.05 if self._scheduler.queue else None

    def step(self) -> None:
        """One turn of the loop."""
        now = self._clock()
        out = StepOutputs(self._clock)
        self._take_in(out)
        for sequence, error in self._alarms.due(now):
            if sequence.request.max_wait is not None and not sequence.first_token:
                self._observer.on_shed("late")
            self._fail(sequence, error, out)
        self._load_adapters(now, out)
        batch = self._scheduler.schedule(now)
        for sequence, error in self._admission.failed:
            self._fail(sequence, error, out)
        self._admission.failed.clear()
        if batch:
            self._run(batch, now, out)
            self._steps += 1
        elif not self._scheduler.running and not self._scheduler.queue:
            self._looks.look()
        out.deliver()

    def check_integrity(self) -> None:
        """Raise if something is lost or held twice. On the engine thread, between two steps."""
        self._scheduler.check_integrity()
        self.adapters.check_integrity()

    def _take_in(self, out: StepOutputs) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                if self._known.get(item.id) is item:  # it may have ended in the inbox
                    self._scheduler.add(item)
                    self._alarms.add(item)
            elif isinstance(item, Reweighting):
                changed = self._known.get(item.request_id)
                if changed is not None and changed.group is not None:
                    changed.group.set_weights(item.weights)
            elif (known := self._known.get(item)) is not None:
                error = self._turned_away.get(known)
                if error is not None:
                    self._observer.on_shed(error.reason)
                self._fail(known, error or Cancelled("cancelled by the client"), out)

    def _load_adapters(self, now: float, out: StepOutputs) -> None:
        """Publish what was loaded, and have loaded what is waited for; end what can never be."""
        wanting = self._scheduler.order.wanting(now)
        for head in wanting:
            try:
                self._check_hope(head)
            except RequestError as error:
                for sequence in self._scheduler.waiting:
                    if sequence.held == head.held:
                        self._fail(sequence, error, out)
        self.adapters.step([s.held for s in wanting if s in self._scheduler.queue])

    def _check_hope(self, sequence: Sequence) -> None:
        """Raise what keeps its adapters from ever being resident."""
        for residency in sequence.held:
            if residency.state is AdapterState.FAILED:
                raise AdapterUnavailable(
                    f"adapter {residency.name!r} could not be loaded: {residency.error}",
                    field="model",
                )
        self.adapters.check_room(sequence.held)

    def _run(self, batch: Batch, now: float, out: StepOutputs) -> None:
        with self._lock:
            for part in batch.parts:
                lead = part.sequence.lead
                if not lead.started:
                    lead.started = now
                    self._intake.leave(lead)
        load = self._scheduler.charge(batch)
        adapter_bytes, began = load.adapter_bytes, self._clock()
        try:
            rows, logits, best = self._runner.run(batch)
            if batch.chunks:
                seconds = time.monotonic() - now
                self._scheduler.blocks.memory.computed(batch.tokens, seconds)
            out.advance(
                batch, rows, logits, self._scheduler, self._eos, self._limits.max_length, best
            )
        except Exception:
            if not self._runner.works():
                raise
            incident = uuid.uuid4().hex[:12]
            log.exception("incident %s: a step of %d tokens failed", incident, batch.tokens)
            failure = EngineFailure(f"the step failed (incident {incident} in the server's log)")
            computed = list(dict.fromkeys(part.sequence for part in batch.parts))
            self._discard(computed)
            for lead in dict.fromkeys(sequence.lead for sequence in computed):
                self._fail(lead, failure, out)
            return
        self._scheduler.cost.observe(load.tokens, adapter_bytes, self._clock() - began)
        self._discard(out.poisoned)
        for sequence, output in out.finished:
            self._end(sequence, output, out)
        out.observe(self._observer)

    def _discard(self, sequences: list[Sequence]) -> None:
        """Their keys and values are not to be used by anyone. What others share as well is not
        found any more, and discarded with the last of them."""
        holders = Counter(block for s in sequences for block in s.blocks)
        blocks = self._scheduler.blocks
        blocks.forget(holders)
        own = [block for block, count in holders.items() if blocks.references(block) == count]
        if own:
            self._runner.scrub(own)

    def _fail(self, sequence: Sequence, error: RequestError, out: StepOutputs) -> None:
        self._end(sequence, error_output(sequence, error, self._clock()), out)

    def _end(self, sequence: Sequence, output: Output, out: StepOutputs) -> None:
        """The request is over: give back what it held and say so."""
        reason = output.finish_reason or FinishReason.ERROR
        with self._lock:
            if self._known.pop(sequence.id, None) is None:
                return
            self._woken = True  # others may have waited for it
            self._turned_away.pop(sequence, None)
            self._intake.ended(sequence, reason)
            self._lock.notify_all()
        self._scheduler.remove(sequence)
        for member in sequence.members:
            chosen = member.chosen if member.admitted else ()
            self.adapters.release(member.adapters, running=member.admitted, chosen=chosen)
        out.add(sequence, output)
        if output.usage is not None and output.timings is not None:
            self._observer.on_finished(sequence.label, reason, output.usage, output.timings)

    def _abandon(self, error: RequestError | None = None) -> None:
        """Fail everything that is in flight."""
        out = StepOutputs(self._clock)
        cause = error or ShuttingDown("the server is shutting down")
        for sequence in list(self._known.values()):
            self._fail(sequence, cause, out)
        out.deliver()

    # Inside:

    def _wake_locked(self) -> None:
        self._woken = True
        self._lock.notify_all()
