"""Messages of `deltaserve.v1` -> TGIS's, one for each piece of an answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from deltaserve.server.tgis.requests import Wanted
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.v1 import generation_pb2 as pb

Names = Callable[[Sequence[int]], list[str]]
"""Token ids -> what the vocabulary calls them."""

_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: tgis.ERROR,
    pb.FINISH_REASON_CANCELLED: tgis.CANCELLED,
    pb.FINISH_REASON_DEAD_END: tgis.ERROR,
}


class Answer:
    """One answer as it comes. text, ids: the prompt's. eos: the model's tokens that end a text."""

    def __init__(
        self, asked: Wanted, text: str, ids: Sequence[int], names: Names, eos: Collection[int]
    ) -> None:
        self._asked = asked
        self._text = text
        self._ids = ids
        self._names = names
        self._eos = eos
        self._count = 0

    def prompt(self, start: pb.StreamStart | None) -> tgis.GenerationResponse:
        """What is told of the prompt, before anything else. start: None if nothing was computed."""
        asked = self._asked
        return tgis.GenerationResponse(
            input_token_count=len(self._ids),
            text=self._text if asked.input_text else "",
            seed=asked.seed,
            input_tokens=self._tokens(self._ids, start.prompt_logprobs)
            if asked.input_tokens and start is not None
            else (),
        )

    def piece(self, message: pb.GenerateStreamResponse) -> tgis.GenerationResponse:
        """What is new of the text, and why it ended, if it did."""
        found = tgis.GenerationResponse()
        last = -1
        for delta in message.deltas:  # there is one choice
            self._count += len(delta.token_ids)
            last = delta.token_ids[-1] if delta.token_ids else last
            found.text += delta.text
            if self._asked.generated_tokens:
                found.tokens.extend(self._tokens(delta.token_ids, delta.logprobs))
        found.generated_token_count = self._count
        for finish in message.finishes:
            found.stop_reason, found.stop_sequence = self._reason(finish, last)
            if found.stop_reason == tgis.STOP_SEQUENCE and self._asked.stop_sequence:
                found.text += found.stop_sequence
        return found

    def too_late(self) -> tgis.GenerationResponse:
        """The end by the time limit."""
        return tgis.GenerationResponse(
            generated_token_count=self._count, stop_reason=tgis.TIME_LIMIT
        )

    def _reason(self, finish: pb.StreamFinish, last: int) -> tuple[tgis.StopReason, str]:
        """last: the token that it ended with."""
        if finish.finish_reason == pb.FINISH_REASON_LENGTH:
            enough = self._count >= self._asked.limit
            return tgis.MAX_TOKENS if enough else tgis.TOKEN_LIMIT, ""
        if finish.finish_reason != pb.FINISH_REASON_STOP:
            return _REASONS[finish.finish_reason], ""
        if last in self._eos and finish.stop_reason == str(last):
            return tgis.EOS_TOKEN, self._names([last])[0]
        if not finish.stop_reason:  # the end of a constraint
            return tgis.EOS_TOKEN, ""
        return tgis.STOP_SEQUENCE, finish.stop_reason

    def _tokens(
        self, ids: Sequence[int], scores: Sequence[pb.TokenLogprob]
    ) -> Iterator[tgis.TokenInfo]:
        """scores: of each of them, or none."""
        names = self._names(ids)
        if not scores:
            return (tgis.TokenInfo(text=name) for name in names)
        pairs = zip(names, scores, strict=True)
        return (self._token(name, score) for name, score in pairs)

    def _token(self, name: str, score: pb.TokenLogprob) -> tgis.TokenInfo:
        asked = self._asked
        return tgis.TokenInfo(
            text=name,
            logprob=score.logprob if asked.logprobs else 0,
            rank=score.rank,
            top_tokens=[
                tgis.TokenInfo.TopToken(text=text, logprob=top.logprob if asked.logprobs else 0)
                for text, top in zip(
                    self._names([t.token_id for t in score.top]), score.top, strict=True
                )
            ],
        )


def whole(pieces: Iterable[tgis.GenerationResponse]) -> tgis.GenerationResponse:
    """All pieces of an answer as one."""
    found = tgis.GenerationResponse()
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        piece.text = ""
        found.MergeFrom(piece)  # what a later piece does not set, stays; lists grow
    found.text = "".join(texts)
    return found
