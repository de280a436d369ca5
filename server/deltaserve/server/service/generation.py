"""GenerationService: requests in, outputs out."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from deltaserve.server.engine.core import Output, Request, SamplingParams, ServedAdapter
from deltaserve.server.errors import RequestUnknown
from deltaserve.server.identity.quotas import Quotas
from deltaserve.server.identity.sight import Sight
from deltaserve.server.service import answer, combined, convert
from deltaserve.server.service.asked import Asked, extras
from deltaserve.server.service.call import Call
from deltaserve.server.service.constrain import Constrainer
from deltaserve.server.service.encode import Encoder, Encoders
from deltaserve.server.service.outbox import LoopOutbox
from deltaserve.server.service.routed import Routed
from deltaserve.server.service.routing import Routing
from deltaserve.server.service.shadows import Shadows
from deltaserve.server.service.submit import Submitter, engine_id, name_of
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine

log = logging.getLogger(__name__)


class GenerationService:
    """Whatever ends a call (its answer, an error, a cancelled or vanished client, a deadline, a
    blocked write), its requests are taken from the engine. max_seconds: longest life of a
    request."""

    def __init__(
        self,
        engine: Engine,
        encoders: Encoders,
        constrainer: Constrainer,
        outbox: LoopOutbox,
        routing: Routing,
        sight: Sight,
        quotas: Quotas,
        max_seconds: float,
    ) -> None:
        self._engine = engine
        self._info = engine.info()
        self._encoders = encoders
        self._constrainer = constrainer
        self._submitter = Submitter(engine, outbox, quotas)
        self._routing = routing
        self._sight = sight
        unpaid = partial(self._submitter.submitted, paid=False)
        self.shadows = Shadows(engine, routing, self._asked, unpaid)
        self._max_seconds = max_seconds

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        routed = self._routing.of(request, call)
        with convert.blaming(request), routed.running():
            response = await self._generate(routed, call)
        self.shadows.cast(request, routed, call)
        return response

    async def _generate(
        self, routed: Routed[pb.GenerateRequest], call: Call
    ) -> pb.GenerateResponse:
        asked = await self._asked(routed.request, call)
        outputs: dict[str, list[Output]] = {r.request_id: [] for r in asked.requests}
        async with self._submitter.submitted(asked.requests, call) as stream:
            while not stream.done:
                for output in routed.heard(asked.heard(_checked(await stream.take()))):
                    outputs[output.request_id].append(output)
        each = list(outputs.values())
        lasts = [found[-1] for found in each]
        name = name_of(asked.requests[0].request_id)
        _log(name, lasts, routed.shown)
        best = asked.best(each)
        routed.answered_by(found[-1].request_id for found in best)
        return pb.GenerateResponse(
            request_id=name,
            choices=[answer.choice(i, asked.shown(found)) for i, found in enumerate(best)],
            served_by=routed.mark(answer.served_by(lasts[0], self._info)),
            usage=answer.usage((o.usage for o in lasts if o.usage), one_prompt=True),
            timings=answer.timings(o.timings for o in lasts if o.timings),
            prompt_logprobs=map(answer.logprob, asked.prompt_logprobs),
        )

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, call: Call
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        routed = self._routing.of(request, call)
        with convert.blaming(request), routed.running():
            async with aclosing(self._pieces(routed, call)) as messages:
                async for message in messages:
                    yield message
        self.shadows.cast(request, routed, call)

    async def _pieces(
        self, routed: Routed[pb.GenerateStreamRequest], call: Call
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        asked = await self._asked(routed.request, call)
        indices = {r.request_id: i for i, r in enumerate(asked.requests)}
        name = name_of(asked.requests[0].request_id)
        started = False
        async with self._submitter.submitted(asked.requests, call) as stream:
            while not stream.done:
                heard = routed.heard(asked.heard(_checked(await stream.take())))
                outputs = asked.shown(heard)
                message = answer.piece(outputs, indices)
                if not started and outputs[0].served_by is not None:
                    started = True
                    message.start.request_id = name
                    served = answer.served_by(outputs[0], self._info)
                    message.start.served_by.CopyFrom(routed.mark(served))
                    prompt = map(answer.logprob, asked.prompt_logprobs)
                    message.start.prompt_logprobs.extend(prompt)
                    message.start.prompt_tokens = asked.prompt_tokens
                yield message
                _log(name, [o for o in outputs if o.finish_reason is not None], routed.shown)

    async def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        routed = self._routing.of(request, call)
        with convert.blaming(request), routed.running():
            return await self._score(routed, call)

    async def _score(self, routed: Routed[pb.ScoreRequest], call: Call) -> pb.ScoreResponse:
        request = routed.request
        convert.check_labels(request)
        name = request.request_id or uuid.uuid4().hex
        base = self._info.names
        adapters = convert.adapters(request, base)
        deadline = call.deadline(self._max_seconds)
        tenant, user = call.caller.behalf(request.user)
        encoder = await self._encoders.of(self._seen(convert.named(request, base), call))
        asked = await combined.to_score(request, base, encoder)
        requests = [
            Request(
                request_id=engine_id(name, i),
                prompt_ids=ids,
                sampling=SamplingParams(max_tokens=0, score_from=start, prompt_logprobs=1),
                adapters=adapters,
                priority=request.priority,
                tenant=tenant,
                user=user,
                max_wait=convert.max_wait(request),
                deadline=deadline,
                salt=call.caller.salted(request.cache_salt),
                combination=combination,
            )
            for i, (ids, start, combination) in enumerate(asked)
        ]
        lasts: dict[str, Output] = {}
        async with self._submitter.submitted(requests, call) as stream:
            while not stream.done:
                for output in routed.heard(_checked(await stream.take())):
                    lasts[output.request_id] = output
        ordered = [lasts[r.request_id] for r in requests]
        _log(name, ordered, routed.shown)
        return pb.ScoreResponse(
            request_id=name,
            scores=[answer.score(o) for o in ordered],
            served_by=routed.mark(answer.served_by(ordered[0], self._info)),
            usage=answer.usage(o.usage for o in ordered if o.usage),
        )

    async def SetWeights(self, request: pb.SetWeightsRequest, call: Call) -> pb.SetWeightsResponse:
        called = self._submitter.called(request.request_id, call.caller.tenant)
        if len({i.rpartition("#")[0] for i in called}) < len(called):  # choices of one are numbered
            found = f"{request.request_id!r}, as several requests in flight are called,"
            convert.refuse("request_id", found, "the name of one alone")
        unknown: RequestUnknown | None = None
        changed = 0
        for request_id in called or [""]:
            try:
                self._engine.set_weights(request_id, tuple(request.weights))
                changed += 1
            except RequestUnknown as error:  # a choice that has ended
                unknown = error
        if unknown is not None and not changed:
            raise unknown
        return pb.SetWeightsResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        encoder = await self.encoder(request.model, call)
        ids = await encoder.prompt(request)
        return pb.TokenizeResponse(token_ids=ids, max_length=self._info.max_length)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        encoder = await self.encoder(request.model, call)
        return pb.DetokenizeResponse(text=await encoder.detokenize(list(request.token_ids)))

    async def encoder(self, model: str, call: Call) -> Encoder:
        """Of the adapter that it names, if it does; of a route, the one that its arms share."""
        name = convert.label("model", model)
        route = self._routing.route(name, call)
        if route is None:
            names = [("model", name)] if name and name not in self._info.names else []
            return await self._encoders.of(self._seen(names, call), known=True)
        found = {}
        for arm in route.arms.values():
            called = self._seen((("model", name) for name in arm.called), call)
            found[arm.name] = await self._encoders.of(called, known=True)
        control = found[route.control]
        for arm_name, encoder in found.items():
            if encoder.tokenizer is not control.tokenizer:
                what = f"route {name!r}, whose arms {route.control!r} and {arm_name!r} bring "
                right = "a route whose arms share a tokenizer, or an adapter"
                convert.refuse("model", what + "different tokenizers,", right)
        return control

    def _seen(self, named: Iterable[tuple[str, str]], call: Call) -> list[str]:
        """named: fields with what they call adapters. -> the latter; AdapterUnknown for one that
        the caller may not see."""
        found = list(named)
        for field, name in found:
            self._sight.check(call.caller, name, field)
        return [name for _, name in found]

    async def _asked(self, request: convert.GenerateRequest, call: Call) -> Asked:
        """One request for each choice."""
        convert.check_labels(request)
        base = self._info.names
        adapters = convert.adapters(request, base)
        wanted = extras(request)
        samplings = [convert.sampling(request, i) for i in range(wanted.choices)]
        speculation = convert.speculation(request)
        encoder = await self._encoders.of(self._seen(convert.named(request, base), call))
        prompt, combination = await combined.to_generate(request, base, encoder)
        if words := convert.bad_words(request):
            bad = await encoder.bad_tokens(words)
            samplings = [replace(s, bad_tokens=(*s.bad_tokens, *bad)) for s in samplings]
        wanted.check(len(prompt), combination)
        samplings = wanted.samplings(samplings, len(prompt))
        constraint = convert.constraint(request)
        matchers = await self._constrainer.matchers(constraint, len(samplings), encoder.tokenizer)
        name = request.request_id or uuid.uuid4().hex
        deadline = call.deadline(self._max_seconds)
        tenant, user = call.caller.behalf(request.user)
        ids = [engine_id(name, i) for i in range(wanted.choices)]
        requests = [
            Request(
                request_id=ids[i],
                prompt_ids=prompt,
                sampling=sampling,
                adapters=adapters,
                priority=request.priority,
                tenant=tenant,
                user=user,
                max_wait=convert.max_wait(request),
                deadline=deadline,
                salt=call.caller.salted(request.cache_salt),
                speculation=speculation,
                combination=combination,
                matcher=matcher,
                sibling=ids[0] if i else "",
                tokenizer=None if encoder.tokenizer.trusted else encoder.tokenizer.backend,
            )
            for i, (sampling, matcher) in enumerate(zip(samplings, matchers, strict=True))
        ]
        if not wanted.echo:
            return Asked(requests, wanted, None)
        if request.WhichOneof("prompt") == "text":
            return Asked(requests, wanted, request.text)
        shown = await encoder.decode(prompt, keep_special_tokens=request.keep_special_tokens)
        return Asked(requests, wanted, shown)


def _checked(outputs: list[Output]) -> list[Output]:
    """The same, unless one of them is a failure."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def _log(name: str, lasts: list[Output], route: str) -> None:
    for last in lasts:
        used = last.usage
        log.info(
            "request=%s route=%s adapters=%s finish=%s prompt=%d completion=%d cached=%d "
            "seconds=%.3f",
            name,
            route,
            "|".join(map(_shown, [m.adapters for m in last.members] or [last.served_by or ()])),
            last.finish_reason,
            used.prompt_tokens if used else 0,
            used.completion_tokens if used else 0,
            used.cached_tokens if used else 0,
            last.timings.total if last.timings else 0.0,
        )


def _shown(adapters: Sequence[ServedAdapter]) -> str:
    return ",".join(f"{a.name}@{a.digest[:12]}*{a.strength:g}" for a in adapters) or "-"
