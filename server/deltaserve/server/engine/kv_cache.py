"""Which cache block belongs to whom, and which blocks' contents can be used again.

Pure Python, no tensors: a block is a number. Block 0 is never handed out: it stays zero and pads
block tables. Blocks take memory in extents, as many as the tier's `Ledger` has room for; the lowest
numbers are handed out first, so that extents become empty and their memory can serve adapters.
Where blocks lie side by side below a boundary (`kv_memory.Boundary`), those above are moved into
the places of those that go, and have other numbers then.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from types import MappingProxyType

from deltaserve.server.engine.kv_memory import BlockMemory, moves_below
from deltaserve.server.engine.memory import Ledger, Offer


class OutOfBlocks(Exception):
    """No block is free and none that is idle can be evicted."""


def chain_root(*fields: str | bytes) -> bytes:
    """The start of a hash chain: everything besides the tokens that keys and values depend on
    (base, adapters with strengths, tenant). Fields are length-prefixed, so they cannot run into
    each other."""
    digest = hashlib.blake2b(digest_size=16)
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block of tokens that follows the block hashed `parent`."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


def chain(parent: bytes, number: int, tokens: Sequence[int], turns: Mapping[int, bytes]) -> bytes:
    """The hash of block `number` of a sequence. turns: block number -> what changes inside that
    block besides the tokens, such as an adapter that becomes active."""
    turn = turns.get(number)
    return block_hash(parent if turn is None else chain_root(parent, turn), tokens)


OFFERS = 256
"""Most offers of unused blocks that are made at once, each of several where there are more."""


class BlockManager:
    """Free list, reference counts and prefix index of `blocks` blocks of `block_size` tokens.

    A block is absent (its extent has no memory), free (its content is worth nothing), used (by one
    or more sequences), or idle: used by none, but indexed by its content, so a sequence with the
    same prefix can take it up again. When no free one is left, the least valuable idle block or
    adapter makes way (`memory.Ledger`). memory: None for all blocks being there for good.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        memory: BlockMemory | None = None,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.memory = memory or BlockMemory(Ledger(blocks), blocks, blocks)
        self.memory.ledger.idle_blocks = self._offers
        if self.memory.boundary is not None:
            self.memory.ledger.idle_blocks = self._offers_below
            self.memory.ledger.idle_block_bytes = self._unused_bytes
            self.memory.ledger.settle = self._settle
        self.moved: Callable[[Mapping[int, int]], None] = lambda renamed: None
        """Called with the new numbers of blocks, by their old ones."""
        self._holes: set[int] = set()
        extents = -(-blocks // self.memory.extent)
        self._absent = list(range(extents))  # a heap, as _free is
        self._free: list[int] = []
        self._references = [0] * blocks
        self._used_in = [0] * extents
        self._used = 0
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._uses: dict[int, int] = {}
        self._idle: dict[int, tuple[float, int]] = {}  # block -> its value, and when it got it
        self._order: list[tuple[float, int, int]] = []  # a heap of them; stale entries too
        self._releases = 0
        self.hit_tokens = 0
        self.query_tokens = 0
        if not self._extend(inf):
            raise ValueError(f"no room for the first {self.memory.extent_bytes} bytes of blocks")

    @property
    def total(self) -> int:
        """Blocks that can be handed out when nothing else takes the memory."""
        return self.blocks - 1

    @property
    def available(self) -> int:
        """Blocks that `take` can still return, unless adapters on their way are in between."""
        memory = self.memory
        there = len(self._free) + len(self._idle)
        if self._absent:
            more = memory.ledger.kv_room() // memory.extent_bytes * memory.extent
            if memory.boundary is not None:
                more = max(0, min(more, memory.boundary.reach - self.there))
            there = min(there + more, self.total - self._used)
        return max(0, min(there, self._most - self._used))

    @property
    def used(self) -> int:
        return self._used

    def memory_of(self, blocks: int) -> int:
        """Memory of so many, and of the one that pads tables, in whole extents."""
        return -(-(blocks + 1) // self.memory.extent) * self.memory.extent_bytes

    def claim(self, blocks: int) -> bool:
        """Before a request begins that may need so many: be sure that it can have them when all
        others are preempted. False if it must wait for adapters that are used."""
        need, ledger = self.memory_of(blocks), self.memory.ledger
        return need <= max(ledger.kv_floor, ledger.claimed) or ledger.claim(need)

    def keep_claim(self, blocks: int) -> None:
        """So many are the most that any of the running requests may need."""
        self.memory.ledger.claimed = min(self.memory.ledger.claimed, self.memory_of(blocks))

    @property
    def there(self) -> int:
        """Blocks that have memory now, with the one that pads tables."""
        return self.memory.ledger.kv // self.memory.extent_bytes * self.memory.extent

    @property
    def idle(self) -> int:
        """Blocks whose content is kept in case it is wanted again."""
        return len(self._idle)

    @property
    def _most(self) -> int:
        """Blocks that sequences may use now; fewer than there are where an adapter was promised
        room."""
        memory = self.memory
        return min(self.total, memory.ledger.kv_ceiling // memory.extent_bytes * memory.extent - 1)

    def take(self) -> int:
        """A block for one sequence, its old content forgotten."""
        if self._used >= self._most:
            raise OutOfBlocks
        if not self._free:
            cheapest = self._cheapest()
            worth = inf if cheapest is None else self._idle[cheapest][0]
            if not self._extend(worth):
                if cheapest is None:
                    raise OutOfBlocks
                self._evict(cheapest)
        block = heapq.heappop(self._free)
        self._hold(block)
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each; later blocks of a sequence go first, so that a long
        prefix is evicted from its end."""
        memory = self.memory
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._used -= 1
                self._used_in[block // memory.extent] -= 1
                if block in self._hash_of:
                    self._releases += 1
                    value = memory.ledger.value(
                        self._uses[block],
                        memory.token_seconds * self.block_size,
                        memory.extent_bytes // memory.extent,
                    )
                    self._idle[block] = value, self._releases
                    heapq.heappush(self._order, (value, self._releases, block))
                else:
                    heapq.heappush(self._free, block)
        if len(self._order) > 2 * len(self._idle) + 64:
            self._order = [(*entry, block) for block, entry in self._idle.items()]
            heapq.heapify(self._order)

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def match(
        self,
        root: bytes,
        tokens: Sequence[int],
        limit: int,
        turns: Mapping[int, bytes] = MappingProxyType({}),
    ) -> tuple[list[int], list[bytes]]:
        """The blocks, now referenced, that hold the longest cached prefix of at most `limit`
        tokens, and their hashes. turns: as in `chain`."""
        if not self.prefix_cache:
            return [], []
        size, parent = self.block_size, root
        blocks: list[int] = []
        hashes: list[bytes] = []
        for i in range(limit // size):
            parent = chain(parent, i, tokens[i * size : (i + 1) * size], turns)
            block = self._block_of.get(parent)
            if block is None:
                break
            if self._references[block] == 0:
                del self._idle[block]
            self._hold(block)
            self._uses[block] += 1
            blocks.append(block)
            hashes.append(parent)
        self.hit_tokens += len(blocks) * size
        self.query_tokens += len(tokens)
        return blocks, hashes

    def share(self, blocks: Iterable[int], tokens: int) -> list[int]:
        """One more reference to blocks that another sequence holds, for one of so many tokens."""
        shared = list(blocks)
        for block in shared:
            assert self._references[block] > 0
            self._hold(block)
            if block in self._uses:
                self._uses[block] += 1
        self.hit_tokens += len(shared) * self.block_size
        self.query_tokens += tokens
        return shared

    def publish(self, block: int, content: bytes) -> None:
        """`block` holds, for good, what `content` is the hash of."""
        if not self.prefix_cache or content in self._block_of or block in self._hash_of:
            return
        self._block_of[content] = block
        self._hash_of[block] = content
        self._uses[block] = 1

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the blocks out of the prefix index: their content is not to be used again."""
        for block in blocks:
            content = self._hash_of.pop(block, None)
            if content is not None:
                del self._block_of[content], self._uses[block]
            if block in self._idle:
                del self._idle[block]
                heapq.heappush(self._free, block)

    def check_integrity(self) -> None:
        """Raise if a block is lost or held twice. Called when nothing runs, and by tests."""
        extent = self.memory.extent
        absent = {b for e in self._absent for b in self._blocks_of(e)}
        free, idle = set(self._free), set(self._idle)
        held = {b for b in range(1, self.blocks) if self._references[b] > 0}
        states = (absent, free, idle, held)
        if len(free) != len(self._free) or len(set().union(*states)) < sum(map(len, states)):
            raise AssertionError("a block is in two states")
        if sum(map(len, states)) != self.total:
            raise AssertionError("a block is in no state")
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise AssertionError("the prefix index disagrees with itself")
        if self._uses.keys() != self._hash_of.keys():
            raise AssertionError("a block's uses are not those of its content")
        if any(b not in self._hash_of for b in idle):
            raise AssertionError("an idle block has no content")
        if {(*entry, b) for b, entry in self._idle.items()} - set(self._order):
            raise AssertionError("an idle block can never be evicted")
        used_in = [sum(b in held for b in self._blocks_of(e)) for e in range(len(self._used_in))]
        if used_in != self._used_in or self._used != len(held):
            raise AssertionError("an extent's used blocks are counted wrongly")
        there = len(self._used_in) - len(self._absent)
        if self.memory.ledger.kv != there * self.memory.extent_bytes:
            raise AssertionError(f"{there} extents of {extent} blocks, {self.memory.ledger.kv} B")
        if self._holes:
            raise AssertionError("blocks that are gone have their memory")
        if self.memory.boundary is not None:
            if min(self._absent, default=there) < there:
                raise AssertionError("a block without memory is below one that has some")
            self.memory.boundary.check(there)
        self.memory.ledger.check_integrity()

    def _hold(self, block: int) -> None:
        self._references[block] += 1
        if self._references[block] == 1:
            self._used += 1
            self._used_in[block // self.memory.extent] += 1

    def _blocks_of(self, extent: int) -> range:
        """Its blocks that can be handed out."""
        size = self.memory.extent
        return range(max(1, extent * size), min(self.blocks, (extent + 1) * size))

    def _extend(self, worth: float) -> bool:
        """Take memory for one more extent, at the cost of idle adapters worth less."""
        memory, boundary = self.memory, self.memory.boundary
        if not self._absent or (boundary and self._absent[0] >= boundary.reach):
            return False
        if not memory.ledger.take_kv(memory.extent_bytes, worth):
            return False
        if boundary and not boundary.extend(self._absent[0] + 1):
            memory.ledger.kv -= memory.extent_bytes
            return False
        for block in self._blocks_of(heapq.heappop(self._absent)):
            heapq.heappush(self._free, block)
        return bool(self._free) or self._extend(worth)  # the first may be the padding alone

    def _cheapest(self) -> int | None:
        """The idle block of the least value."""
        while self._order:
            value, when, block = self._order[0]
            if self._idle.get(block) == (value, when):
                return block
            heapq.heappop(self._order)
        return None

    def _evict(self, block: int) -> None:
        self.memory.ledger.clock = max(self.memory.ledger.clock, self._idle[block][0])
        self.forget((block,))

    def _offers(self) -> list[Offer]:
        """Extents that nobody uses, the least valuable first, of equals the last; never the first,
        which pads tables."""
        absent, offers = set(self._absent), []
        for extent in range(len(self._used_in) - 1, 0, -1):
            if self._used_in[extent] or extent in absent:
                continue
            blocks = self._blocks_of(extent)
            worth = sum(self._idle[b][0] for b in blocks if b in self._idle) / len(blocks)
            offers.append(Offer(worth, self.memory.extent_bytes, partial(self._shrink, extent)))
        return sorted(offers, key=lambda offer: offer.value)

    def _shrink(self, extent: int) -> None:
        """Forget an unused extent's blocks and give its memory back."""
        gone = self._blocks_of(extent)
        assert not self._used_in[extent]
        self.forget(gone)
        self._free = [b for b in self._free if b not in gone]
        heapq.heapify(self._free)
        heapq.heappush(self._absent, extent)
        self.memory.drop(extent)
        self.memory.ledger.kv -= self.memory.extent_bytes

    def _unused_bytes(self) -> int:
        return (len(self._free) + len(self._idle)) * self.memory.extent_bytes

    def _offers_below(self) -> list[Offer]:
        """Blocks that nobody uses, the least valuable first, of equals the last."""
        unused = [(0.0, -block) for block in self._free]
        unused += [(value, -block) for block, (value, _) in self._idle.items()]
        unused.sort()
        size = -(-len(unused) // OFFERS)
        offers = []
        for at in range(0, len(unused), max(1, size)):
            part = unused[at : at + size]
            worth, nbytes = part[-1][0], len(part) * self.memory.extent_bytes
            offers.append(Offer(worth, nbytes, partial(self._leave, [-b for _, b in part])))
        return offers

    def _leave(self, blocks: list[int]) -> None:
        """Forget unused blocks; `_settle` gives their memory back."""
        assert not any(self._references[block] for block in blocks)
        self.forget(blocks)
        self._holes.update(blocks)
        self.memory.ledger.kv -= len(blocks) * self.memory.extent_bytes

    def _settle(self) -> None:
        """Move what is above the blocks that are left into the places of those that are gone."""
        if not self._holes:
            return
        there = len(self._used_in) - len(self._absent)
        free = set(self._free) - self._holes
        after = there - len(self._holes)
        moves, left = moves_below(there, self._holes, free)
        assert self.memory.boundary is not None
        self.memory.boundary.shrink(after, moves)
        self._free = sorted([b for b in free if b < after] + left)
        self._absent = list(range(after, len(self._used_in)))
        self._holes.clear()
        for old, new in moves:
            self._rename(old, new)
        self.moved(dict(moves))

    def _rename(self, old: int, new: int) -> None:
        for counts in (self._references, self._used_in):
            counts[new], counts[old] = counts[old], 0
        content = self._hash_of.pop(old, None)
        if content is not None:
            self._hash_of[new], self._block_of[content] = content, new
            self._uses[new] = self._uses.pop(old)
        if old in self._idle:
            self._idle[new] = self._idle.pop(old)
            heapq.heappush(self._order, (*self._idle[new], new))
