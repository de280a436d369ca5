"""Engine: requests in from any thread, one thread that owns the model, outputs out."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer

from deltaserve.kernels.native.openmp import release_workers
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.admission import Admission
from deltaserve.server.engine.core import (
    AdapterRef,
    AdapterState,
    FinishReason,
    Outbox,
    Output,
    Request,
)
from deltaserve.server.engine.detokenizer import Detokenizer
from deltaserve.server.engine.group import (
    Group,
    Reweighting,
    check_members,
    check_reweighting,
    located,
    members,
)
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.outcome import StepOutputs, error_output
from deltaserve.server.engine.runner import ModelRunner
from deltaserve.server.engine.scheduler import Batch, Scheduler
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.engine.stats import EngineInfo, EngineStats
from deltaserve.server.engine.validate import Limits
from deltaserve.server.errors import (
    AdapterUnavailable,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from deltaserve.server.model.base_model import BaseModel

log = logging.getLogger(__name__)

ROOM_SECONDS = 1.0
"""So long requests whose adapters are in memory may overtake one whose adapter finds no room."""


class Engine:
    """The loop is `step`: take in what came, schedule, run, hand out. Everything that blocks
    (reading adapters, tokenizing, the network) happens on other threads.

    tokenizer: None gives outputs without text. max_queue: requests that may wait or run.
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
        max_queue: int = 4096,
    ) -> None:
        self.adapters = adapters
        self._runner = runner
        self._scheduler = scheduler
        self._observer = observer
        self._info = info
        self._tokenizer = tokenizer
        self._max_queue = max_queue
        self._eos = frozenset(model.eos_token_ids)
        blocks = scheduler.blocks
        self._limits = Limits(
            model.vocab_size,
            model.max_length,
            blocks.total * blocks.block_size,
            blocks.block_size,
            scheduler.max_sequences,
        )
        self._admission = Admission(model, adapters, self._limits, info.held_fingerprint, blocks)
        self._lock = threading.Condition()
        self._inbox: deque[Sequence | str | Reweighting] = deque()
        self._known: dict[str, Sequence] = {}
        self._steps = 0
        self._draining = False
        self._stopping = False
        self._woken = False
        self._stepping = False
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
        check_members(request, self._limits)
        sequence = self._sequence(self._admission.patched(request), outbox)
        try:
            self._enqueue(sequence)
        except RequestError:
            for member in sequence.members:
                self.adapters.release(member.adapters, running=False)
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
            if len(self._known) >= self._max_queue:
                raise Overloaded(
                    f"{len(self._known)} requests wait or run, the limit is {self._max_queue}: "
                    "try again later",
                    retry_after=1.0,
                )
            if request_id in self._known:
                raise InvalidRequest(
                    f"request_id: {request_id!r} is in flight; it must be new", field="request_id"
                )
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
        s, blocks = self._scheduler, self._scheduler.blocks
        running, waiting = list(s.running), list(s.waiting)
        return EngineStats(
            running=len(running),
            waiting=len(waiting) + len(self._inbox),
            kv_blocks_total=blocks.total,
            kv_blocks_used=blocks.used,
            kv_block_size=blocks.block_size,
            kv_blocks_idle=blocks.idle,
            kv_blocks_there=blocks.there,
            kv_bytes=blocks.memory.ledger.kv,
            memory_budget=blocks.memory.ledger.budget,
            adapter_bytes_host=self.adapters.used_bytes,
            adapter_bytes_budget=self.adapters.budget,
            running_adapters=_names(running),
            waiting_adapters=_names(waiting),
            prefix_hits=blocks.hit_tokens,
            prefix_queries=blocks.query_tokens,
            preemptions=s.preemptions,
            steps=self._steps,
            adapter_loads=self.adapters.loads,
            adapter_evictions=self.adapters.evictions,
        )

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

    def shutdown(self) -> None:
        """Stop now; requests in flight fail with ShuttingDown."""
        with self._lock:
            self._draining = self._stopping = True
            self._wake_locked()
        if self._thread.is_alive():
            self._thread.join()
        self.adapters.close()

    # On the engine thread:

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not (self._woken or self._stopping):
                    self._lock.wait(self._patience())
                    if self._scheduler.running or self._scheduler.waiting:
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
            with self._lock:
                self._woken = self._woken or bool(self._scheduler.running)
                self._stepping = False
                if self._draining:
                    self._lock.notify_all()

    def _patience(self) -> float | None:
        """Seconds to wait for news: deadlines of waiting requests are looked at now and then."""
        return 0.05 if self._scheduler.waiting else None

    def step(self) -> None:
        """One turn of the loop."""
        out = StepOutputs()
        self._take_in(out)
        self.adapters.step([held for s in self._scheduler.waiting if (held := s.held)])
        self._scheduler.first = self._overdue()
        batch = self._scheduler.schedule()
        for sequence, error in self._admission.failed:
            self._end(sequence, error_output(sequence, error), out)
        self._admission.failed.clear()
        if batch:
            self._run(batch, out)
            self._steps += 1
        elif not self._scheduler.running and not self._scheduler.waiting:
            self._scheduler.blocks.check_integrity()
        out.deliver()

    def _overdue(self) -> Sequence | None:
        """The request that has waited too long for others' adapters to leave it room."""
        head = next((s for s in self._scheduler.waiting if not s.resident), None)
        if head is None or time.monotonic() - head.submitted < ROOM_SECONDS:
            return None
        return head if any(a.crowded for a in head.held) else None

    def _take_in(self, out: StepOutputs) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                if self._known.get(item.id) is item:  # it may have ended in the inbox
                    self._scheduler.add(item)
            elif isinstance(item, Reweighting):
                changed = self._known.get(item.request_id)
                if changed is not None and changed.group is not None:
                    changed.group.set_weights(item.weights)
            elif (known := self._known.get(item)) is not None:
                self._end(known, error_output(known, Cancelled("cancelled by the client")), out)
        now = time.monotonic()
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            try:
                self._check_hope(sequence, now)
            except RequestError as error:
                self._end(sequence, error_output(sequence, error), out)

    def _check_hope(self, sequence: Sequence, now: float) -> None:
        """Raise what keeps the request from ever being answered."""
        deadline = sequence.request.deadline
        if deadline is not None and now > deadline:
            raise DeadlineExceeded("the request's deadline has passed")
        if sequence.resident:
            return
        for residency in sequence.held:
            if residency.state is AdapterState.FAILED:
                raise AdapterUnavailable(
                    f"adapter {residency.name!r} could not be loaded: {residency.error}",
                    field="model",
                )
        self.adapters.check_room(sequence.held)

    def _run(self, batch: Batch, out: StepOutputs) -> None:
        now = time.monotonic()
        for part in batch.parts:
            lead = part.sequence.lead
            lead.started = lead.started or now
        try:
            rows, logits = self._runner.run(batch)
            if batch.chunks:
                seconds = time.monotonic() - now
                self._scheduler.blocks.memory.computed(batch.tokens, seconds)
            out.advance(batch, rows, logits, self._scheduler, self._eos, self._limits.max_length)
        except Exception:
            incident = uuid.uuid4().hex[:12]
            log.exception("incident %s: a step of %d tokens failed", incident, batch.tokens)
            failure = EngineFailure(f"the step failed (incident {incident} in the server's log)")
            computed = list(dict.fromkeys(part.sequence for part in batch.parts))
            self._discard(computed)
            for lead in dict.fromkeys(sequence.lead for sequence in computed):
                self._end(lead, error_output(lead, failure), out)
            return
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

    def _end(self, sequence: Sequence, output: Output, out: StepOutputs) -> None:
        """The request is over: give back what it held and say so."""
        with self._lock:
            if self._known.pop(sequence.id, None) is None:
                return
            self._woken = True  # others may have waited for it
            self._lock.notify_all()
        self._scheduler.remove(sequence)
        for member in sequence.members:
            chosen = member.chosen if member.admitted else ()
            self.adapters.release(member.adapters, running=member.admitted, chosen=chosen)
        out.add(sequence, output)
        reason = output.finish_reason or FinishReason.ERROR
        if output.usage is not None and output.timings is not None:
            self._observer.on_finished(sequence.label, reason, output.usage, output.timings)

    def _abandon(self, error: RequestError | None = None) -> None:
        """Fail everything that is in flight."""
        out = StepOutputs()
        cause = error or ShuttingDown("the server is shutting down")
        for sequence in list(self._known.values()):
            self._end(sequence, error_output(sequence, cause), out)
        out.deliver()

    # Inside:

    def _sequence(self, request: Request, outbox: Outbox) -> Sequence:
        """The sequence of a request; the first member's, with its group, of a combination."""
        each, p = members(request), request.sampling
        generator = None
        if p.temperature > 0:
            generator = torch.Generator()
            if p.seed is None:
                generator.seed()
            else:
                generator.manual_seed(p.seed)
        detokenizer = Detokenizer(
            self._tokenizer,
            each[0].prompt_ids,
            p.stop,
            skip_special_tokens=p.skip_special_tokens,
        )
        made: list[Sequence] = []
        try:
            for i, one in enumerate(each):
                with located(i, request):
                    held = self.adapters.acquire(one.adapters)
                made.append(Sequence(one, outbox, held, detokenizer, generator))
        except RequestError:
            for sequence in made:
                self.adapters.release(sequence.adapters, running=False)
            raise
        if (
            request.combination is None
            and len(request.prompt_ids) > self._scheduler.blocks.block_size
        ):
            made[0].sibling = self._known.get(request.sibling)
        speculator = self._scheduler.speculator
        if request.combination is not None:
            group = Group(request.combination, tuple(made))
            for sequence in made:
                sequence.group = group
        elif speculator is not None:
            made[0].drafter = speculator.drafter(request)
        return made[0]

    def _wake_locked(self) -> None:
        self._woken = True
        self._lock.notify_all()


def _names(sequences: list[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({a.name for s in sequences for a in s.held}))
