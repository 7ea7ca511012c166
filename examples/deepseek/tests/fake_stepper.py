"""A model whose output shows every mistake of an engine, and the same without an engine.

Its "latents" are the tokens themselves, written into pages through the block table and read back
from there. The logits are a function of all that is read back, in order. So a wrong table, length
or start, a page that somebody else overwrote, or one that was given back, changes them.
"""

import numpy as np

from examples.deepseek.engine import Engine
from examples.deepseek.pages import PagePool
from examples.deepseek.request import Options
from examples.deepseek.sampling import sample

POISON = 2**40 + 12345
VARIETY = 4093  # rows of logits to choose from


class FakeModel:
    """Logits of a sequence: a row of a random matrix, chosen by a hash of the sequence."""

    def __init__(self, vocab_size=97, longest=4096):
        rng = np.random.default_rng(7)
        self.vocab_size = vocab_size
        self.rows = rng.standard_normal((VARIETY, vocab_size)).astype(np.float32) * 3
        self.weights = rng.integers(1, 2**63, longest, np.uint64)

    def logits(self, tokens):
        """`[vocab_size]` float32 after `tokens`."""
        tokens = np.asarray(tokens, np.int64).astype(np.uint64)
        mixed = int(((tokens + np.uint64(1)) * self.weights[: len(tokens)]).sum(dtype=np.uint64))
        mixed = (mixed + len(tokens)) * 0x9E3779B97F4A7C15 % 2**64
        return self.rows[(mixed >> 32) % VARIETY].copy()


class FakeStepper:
    """The members of `steps.Stepper`, over pages of tokens."""

    def __init__(
        self,
        *,
        page_size=4,
        num_pages=24,
        max_blocks=8,
        max_batch=4,
        prefill_chunk=6,
        pools=1,
        vocab_size=97,
    ):
        self.model = FakeModel(vocab_size, longest=page_size * max_blocks)
        self.vocab_size = self.model.vocab_size
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_blocks = max_blocks
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.pools = pools
        self.pages = np.full((pools, num_pages, page_size), POISON)
        self.prefilled = 0  # tokens
        self.decodes = 0

    def prefill(self, tokens, start, block_table, *, pool=0):
        """See `steps.Stepper`."""
        assert 0 < len(tokens) <= self.prefill_chunk, len(tokens)
        assert block_table.shape == (self.max_blocks,), block_table.shape
        assert block_table.dtype == np.int32, block_table.dtype
        self.prefilled += len(tokens)
        positions = start + np.arange(len(tokens))
        page = block_table[positions // self.page_size]
        self.pages[pool, page, positions % self.page_size] = tokens
        return self.model.logits(self._read(pool, block_table, start + len(tokens)))

    def decode(self, tokens, block_table, cache_seqlens):
        """See `steps.Stepper`."""
        for got, shape in (
            (tokens, (self.max_batch,)),
            (block_table, (self.max_batch, self.max_blocks)),
            (cache_seqlens, (self.max_batch,)),
        ):
            assert got.shape == shape and got.dtype == np.int32, (got.shape, got.dtype)
        self.decodes += 1
        logits = np.full((self.max_batch, self.vocab_size), np.nan, np.float32)
        rows = np.flatnonzero(cache_seqlens)
        pool = rows // (self.max_batch // self.pools)
        last = cache_seqlens[rows] - 1
        page = block_table[rows, last // self.page_size]
        slots = list(zip(pool, page, last % self.page_size, strict=True))
        assert len(set(slots)) == len(slots), "two sequences write the same row of a page"
        self.pages[pool, page, last % self.page_size] = tokens[rows]
        for i, row in enumerate(rows):
            read = self._read(pool[i], block_table[row], cache_seqlens[row])
            logits[row] = self.model.logits(read)
        return logits

    def _read(self, pool, block_table, length):
        return self.pages[pool, block_table].reshape(-1)[:length]


class PoisoningPool(PagePool):
    """Overwrites a page as soon as its contents mean nothing."""

    def __init__(self, stepper, number):
        super().__init__(stepper.num_pages, stepper.page_size)
        self._contents = stepper.pages[number]

    def _discard(self, page):
        self._contents[page] = POISON
        super()._discard(page)


def make_engine(stepper, **arguments):
    """An engine whose freed pages are poisoned."""
    engine = Engine(stepper, **arguments)
    engine.pools = [PoisoningPool(stepper, i) for i in range(len(engine.pools))]
    return engine


def generate(model, prompt, options: Options, eos=frozenset(), limit=10**9):
    """What the request must get, computed without pages: its tokens and the finish reason."""
    tokens, generator = list(prompt), options.sampling.generator()
    while True:
        token = sample(model.logits(tokens), options.sampling, generator)
        tokens.append(token)
        generated = tokens[len(prompt) :]
        if token in eos and not options.ignore_eos:
            return generated, "stop"
        if len(generated) == options.max_tokens or len(tokens) >= limit:
            return generated, "length"


def assert_pool_consistent(pool, holders):
    """The pool's books agree with each other and with `holders`, lists of page ids.

    Reads the pool's private members: what is to be shown is that they agree.
    """
    counts = np.bincount([page for pages in holders for page in pages], minlength=pool.num_pages)
    assert counts.tolist() == pool._references, (counts.tolist(), pool._references)
    held = [page for page in range(pool.num_pages) if counts[page]]
    everything = sorted([*held, *pool._free, *pool._kept])
    assert everything == list(range(pool.num_pages)), everything
    assert {digest: page for page, digest in pool._digest_of.items()} == pool._page_of
    assert all(page in pool._digest_of for page in pool._kept)
    assert pool.held == len(held)
    for pages in holders:
        assert len(set(pages)) == len(pages), pages


def assert_books_agree(engine):
    """Between steps: the active hold all pages that are held; the others wait in their order."""
    for number, pool in enumerate(engine.pools):
        active = [r for r in engine._active() if r.place[0] == number]
        assert_pool_consistent(pool, [r.pages for r in active])
    for request in engine._waiting:
        assert request.pages == [] and request.place is None and request.stored == 0
    numbers = [request.number for request in engine._waiting]
    assert numbers == sorted(numbers), numbers
