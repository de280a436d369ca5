"""What the step after this one will most likely be, while this one runs."""

from __future__ import annotations

from deltaserve.server.engine.batch import Batch, Scheduled, placement


def next_decodes(batch: Batch) -> list[Scheduled]:
    """If nobody comes, goes, drafts or stops early, the next step decodes these, in this order:
    each sequence's token that is chosen now. Empty where that is not so: some prompt will not be
    through, or drafts are verified, so nobody knows how far their sequences come."""
    parts = batch.parts
    if not parts or any(part.draft is not None for part in parts):
        return []
    ends = {part.sequence: part for part in parts}  # the last part of each
    if not all(part.sample for part in ends.values()):
        return []
    stay = [part for part in ends.values() if not _ends(part)]
    return sorted(
        (Scheduled(part.sequence, part.start + part.count, 1) for part in stay), key=placement
    )


def _ends(part: Scheduled) -> bool:
    """With the token that is chosen now."""
    lead = part.sequence.lead
    return lead.outputs + 1 >= lead.request.sampling.max_tokens
