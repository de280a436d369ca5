"""Which drafts a step verifies: those that are likely enough for what another row costs.

Reading the weights is shared by all rows of a step. Counted in rows by the measured costs of steps
(`cost`), a step takes these fixed rows and its own. So a draft raises the tokens per second if the
probability that it is taken is above the step's expected tokens per row, the fixed ones included. A
full batch thus leaves room only for drafts that are nearly certain, or for none.
"""

from __future__ import annotations

from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.core import Request
from deltaserve.server.engine.cost import CostModel, StepLoad
from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks
from deltaserve.server.engine.prompt_lookup import Drafter
from deltaserve.server.engine.sequence import Sequence

MIN_NGRAM, MAX_NGRAM = 2, 4

FEWEST_ROWS, MOST_ROWS = 2.0, 256.0
"""Bounds of the rows that a step's fixed part takes as long as, whatever has been measured."""

CATCH_UP = 2048
"""Most tokens that are indexed in one step: long prompts do not hold it up."""


class Speculator:
    """draft_tokens: most for a sequence and step, if its request does not say; 0 is none.
    max_length: tokens of one sequence."""

    def __init__(
        self, blocks: BlockManager, cost: CostModel, max_length: int, draft_tokens: int = 0
    ) -> None:
        self._blocks = blocks
        self._cost = cost
        self._max_length = max_length
        self._draft_tokens = draft_tokens

    def drafter(self, request: Request) -> Drafter | None:
        """What drafts for the request; None if nothing does."""
        asked = request.speculation
        most = self._draft_tokens if asked.draft_tokens is None else asked.draft_tokens
        if most == 0 or request.sampling.max_tokens < 2:
            return None
        low, high = asked.min_ngram, asked.max_ngram
        return Drafter(
            most,
            min(MIN_NGRAM, high or MIN_NGRAM) if low is None else low,
            max(MAX_NGRAM, low or MAX_NGRAM) if high is None else high,
        )

    def extend(self, batch: Batch, budget: int) -> None:
        """Add drafts to the step's decodes. They take nothing from anyone: tokens that the step
        has left (`budget`), and blocks that nobody uses, until the step is over."""
        candidates = self._candidates(batch)
        if not candidates:
            return
        rows = self._fixed_rows(batch) + batch.tokens
        expected = float(sum(part.sample for part in batch.parts))
        left = min(budget, int(rows))  # at most twice the step: others wait for it too
        for probability, sequence, at, token in candidates:
            if left <= 0 or probability * rows < expected:
                break
            if at >= len(sequence.blocks) * self._blocks.block_size:
                if not self._blocks.available:
                    continue
                try:
                    sequence.blocks.append(self._blocks.take())
                except OutOfBlocks:
                    continue
            batch.decodes.append(Scheduled(sequence, at, 1, token))
            assert sequence.drafter is not None
            sequence.drafter.drafted += 1
            expected += probability
            rows += 1
            left -= 1

    def _fixed_rows(self, batch: Batch) -> float:
        """Rows that take as long as what the step takes anyway."""
        load, cost = StepLoad(), self._cost
        for part in batch.parts:
            load.add(part.sequence, part.count)
        rows = cost.seconds(0, load.adapter_bytes) / cost.per_token
        return min(max(rows, FEWEST_ROWS), MOST_ROWS)

    def _candidates(self, batch: Batch) -> list[tuple[float, Sequence, int, int]]:
        """(probability, sequence, place, token), most likely first; each sequence's in order."""
        found = []
        left = CATCH_UP
        for sequence in dict.fromkeys(part.sequence for part in batch.parts):
            if sequence.drafter is not None:
                left -= sequence.drafter.observe(sequence.tokens, left)
        for part in batch.decodes:
            sequence = part.sequence
            if sequence.drafter is None:
                continue
            end = min(sequence.prompt_end + sequence.request.sampling.max_tokens, self._max_length)
            # one more token than drafts comes out of the step
            drafts = sequence.drafter.draft(sequence.tokens, end - len(sequence.tokens) - 1)
            found += [(p, sequence, part.start + 1 + i, t) for i, (t, p) in enumerate(drafts)]
        found.sort(key=lambda candidate: -candidate[0])
        return found
