"""Combinations: the message -> what the engine takes, its members' prompts encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deltaserve.server.engine.core import Combination, Member, Rule
from deltaserve.server.engine.validate import MAX_MEMBERS
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.service import convert
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.service.encode import Encoder

_RULES = {pb.COMBINATION_RULE_MEAN: Rule.MEAN, pb.COMBINATION_RULE_PRODUCT: Rule.PRODUCT}


def check(request: convert.Asked) -> bool:
    """Whether the request is a combination; refuses what cannot be in any."""
    if not request.HasField("combination"):
        return False
    given = request.combination
    for field in ("model", "adapters"):
        if getattr(request, field):
            convert.refuse(field, "one beside a combination", "empty: its members have their own")
    if not 1 <= len(given.members) <= MAX_MEMBERS:
        found = f"{len(given.members)} members"
        convert.refuse("combination.members", found, f"1 to {MAX_MEMBERS}")
    if given.rule not in _RULES:
        right = "COMBINATION_RULE_MEAN or COMBINATION_RULE_PRODUCT"
        convert.refuse("combination.rule", str(given.rule), right)
    own = all(m.WhichOneof("prompt") for m in given.members)
    if own and request.WhichOneof("prompt"):
        right = "left out, where every member of the combination has a prompt of its own"
        convert.refuse("prompt", "one that nobody continues", right)
    return True


async def to_generate(
    request: convert.GenerateRequest, base: tuple[str, ...], encoder: Encoder
) -> tuple[tuple[int, ...], Combination | None]:
    """The prompt's token ids, the first member's if it has none itself, and the combination."""
    if not check(request):
        return tuple(await encoder.prompt(request)), None
    prompts = []
    for i, member in enumerate(request.combination.members):
        with _in_member(i):
            own = member.WhichOneof("prompt")
            prompts.append(tuple(await encoder.prompt(member)) if own else None)
    prompt = prompts[0] if all(prompts) else tuple(await encoder.prompt(request))
    assert prompt is not None
    return prompt, _combination(request, base, prompts)


async def to_score(
    request: pb.ScoreRequest, base: tuple[str, ...], encoder: Encoder
) -> list[tuple[tuple[int, ...], int, Combination | None]]:
    """For each continuation the tokens of prompt and continuation, where the latter begins, and
    the combination. A continuation must be the same tokens behind every member's prompt."""
    if not check(request):
        return [(tuple(ids), start, None) for ids, start in await encoder.continued(request)]
    if request.combination.live:
        convert.refuse("combination.live", "true", "false: nothing is generated")
    each: list[list[tuple[list[int], int]] | None] = []
    for i, member in enumerate(request.combination.members):
        if not (kind := member.WhichOneof("prompt")):
            each.append(None)
            continue
        alone = pb.ScoreRequest(continuations=request.continuations)
        if kind == "text":
            alone.text = member.text
        else:
            getattr(alone, kind).CopyFrom(getattr(member, kind))
        with _in_member(i):
            each.append(await encoder.continued(alone))
    whole = each[0] if all(each) else await encoder.continued(request)
    assert whole is not None
    found: list[tuple[tuple[int, ...], int, Combination | None]] = []
    for k, (ids, start) in enumerate(whole):
        prompts: list[tuple[int, ...] | None] = []
        for i, own in enumerate(each):
            if own is not None and own[k][0][own[k][1] :] != ids[start:]:
                raise InvalidRequest(
                    f"continuations[{k}]: its tokens behind the prompt of combination.members[{i}] "
                    "are others than behind the rest; give the continuation as token ids",
                    field="continuations",
                )
            prompts.append(tuple(own[k][0]) if own is not None else None)
        found.append((tuple(ids), start, _combination(request, base, prompts)))
    return found


def _combination(
    request: convert.Asked, base: tuple[str, ...], prompts: Sequence[tuple[int, ...] | None]
) -> Combination:
    given = request.combination
    members = []
    for i, (member, prompt) in enumerate(zip(given.members, prompts, strict=True)):
        with _in_member(i):
            adapters = convert.adapters(member, base)
        weight = member.weight if member.HasField("weight") else 1.0
        members.append(Member(adapters, weight, prompt))
    return Combination(
        tuple(members), _RULES[given.rule], given.plausibility, given.disagreement, given.live
    )


@contextmanager
def _in_member(i: int) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        if error.field.startswith("continuations"):
            raise  # the request has them
        path = f"combination.members[{i}]."
        raise InvalidRequest(f"{path}{error}", field=path + error.field) from error
