"""Continuous batching: many requests share the rows of a decode and the pages of a pool.

`Engine.step` does, once each:

  1. takes in what was submitted, drops what was cancelled;
  2. prefills: one request at a time, in the order of arrival (so that a prompt finds the pages of
     the one before it), whole chunks, as many as fit into the tokens of one chunk;
  3. decodes one token for every running row.

Pages run out only in 3, where sequences grow. Then the youngest request of the pool gives its pages
back and waits again, before all that came later; it keeps its tokens, is prefilled with them when
there is room, and goes on where it was. The oldest request can have all pages of its pool, and no
request is taken that needs more: so the oldest always gets on, and nothing waits for ever.

The idea of batching by step is Orca's (Yu et al., OSDI 2022), that of pages vLLM's (Kwon et al.,
arXiv 2309.06180).
"""

import bisect
import collections
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.pages import OutOfPages, PagePool
from examples.deepseek.request import Event, Options, Request
from examples.deepseek.sampling import brief, sample


class Engine:
    """Serves requests.

    `submit` and `cancel` may be called from any thread; everything else from one only.

    Attributes:
      limit: tokens of a sequence at most, prompt included.
      evictions: so far.
      pools: the page pools.
    """

    def __init__(
        self,
        stepper,
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        eos: Iterable[int] = (),
        max_tokens: int | None = None,
    ):
        """Starts without requests.

        Args:
          stepper: the model: `steps.Stepper`, or an object with the same members. Where it has
            several `pools`, row `r` of a decode is of pool `r // (max_batch / pools)`, and prefill
            takes the pool's number as `pool=`.
          decode: token ids to text, called in the engine's thread; without it there are no texts.
          eos: end-of-sequence tokens.
          max_tokens: of a sequence, prompt included; default: as many as a block table and the pool
            can hold.
        """
        self.stepper = stepper
        self.eos = frozenset(eos)
        pools = getattr(stepper, "pools", 1)
        if stepper.max_batch % pools:
            raise ValueError(
                f"max_batch: expected a multiple of the {pools} pools, got {stepper.max_batch}"
            )
        self.pools = [PagePool(stepper.num_pages, stepper.page_size) for _ in range(pools)]
        self.limit = stepper.page_size * min(stepper.max_blocks, stepper.num_pages)
        if max_tokens is not None:
            self.limit = min(self.limit, max_tokens)
        self.evictions = 0
        self._decode = decode
        self._numbers = itertools.count()
        self._inbox: collections.deque[Request] = collections.deque()
        self._waiting: list[Request] = []  # by number
        self._prefilling: Request | None = None
        self._rows: list[Request | None] = [None] * stepper.max_batch
        self._per_pool = stepper.max_batch // pools

    def submit(
        self, prompt: Sequence[int], options: Options, sink: Callable[[Event], None]
    ) -> Request:
        """Queues a request.

        Args:
          prompt: token ids, at least one.
          options: what else is asked for.
          sink: called in the engine's thread with each event; if it raises, the request is dropped.

        Raises:
          InvalidRequestError: the prompt is empty, too long, or has ids outside the vocabulary; or
            stop strings without a tokenizer.
        """
        if not prompt:
            raise InvalidRequestError("prompt", "expected at least one token, got none")
        if len(prompt) >= self.limit:
            raise InvalidRequestError(
                "prompt",
                f"expected at most {self.limit - 1} tokens, which leaves room for one of the "
                f"{self.limit} that a sequence may have, got {len(prompt)}",
            )
        vocab_size = self.stepper.vocab_size
        bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                "prompt", f"expected token ids below {vocab_size}, got {brief(bad)}"
            )
        if options.stop and self._decode is None:
            raise InvalidRequestError("stop", "expected none, since there is no tokenizer")
        request = Request(next(self._numbers), prompt, options, sink, self._decode)
        self._inbox.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request in the next step, wherever it is; of no effect on one that is done."""
        request.cancelled = True

    @property
    def counts(self) -> dict[str, int]:
        """How many requests wait and run, pages are held, evictions there were."""
        return {
            "waiting": len(self._inbox) + len(self._waiting),
            "running": len(self._active()),
            "pages_held": sum(pool.held for pool in self.pools),
            "pages": sum(pool.num_pages for pool in self.pools),
            "evictions": self.evictions,
        }

    def step(self) -> bool:
        """Gets on with everything by one step. Returns whether anything is left to do."""
        while self._inbox:
            bisect.insort(self._waiting, self._inbox.popleft(), key=lambda r: r.number)
        for request in [*self._waiting, *self._active()]:
            if request.cancelled:
                self._finish(request, "cancelled")
        self._prefill()
        self._decode_rows()
        return bool(self._waiting or self._active() or self._inbox)

    def abort(self, error: Exception) -> None:
        """Ends all requests with an error and returns their pages, if the books allow it."""
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        for request in [*self._waiting, *self._active()]:
            try:
                self._finish(request, "error", error)
            except Exception:  # what ended the engine may have left the books wrong
                if request.finish_reason is None:
                    request.end("error", error)

    def _active(self):
        return [request for request in self._rows if request is not None]

    def _prefill(self):
        budget = self.stepper.prefill_chunk
        while True:
            request = self._prefilling or self._admit()
            if request is None:
                return
            chunk = min(len(request.tokens) - request.stored, self.stepper.prefill_chunk)
            if chunk > budget:
                return
            budget -= chunk
            pool, _ = request.place
            tokens = request.tokens[request.stored : request.stored + chunk]
            where = {"pool": pool} if len(self.pools) > 1 else {}
            try:
                table = self._table(request)
                logits = self.stepper.prefill(tokens, request.stored, table, **where)
            except Exception as error:  # one request's error is not the others'
                self._finish(request, "error", error)
                continue
            self._stored(request, request.stored + chunk)
            if request.stored == len(request.tokens):
                self._prefilling = None
                self._take(request, logits)

    def _admit(self):
        """Gives a row and pages to the request that has waited longest, if there are enough."""
        if not self._waiting:
            return None
        request = self._waiting[0]
        # With the page that the first decoded token needs.
        count = len(request.tokens) // self.stepper.page_size + 1
        # At least one token is prefilled, for its logits.
        findable = (len(request.tokens) - 1) // self.stepper.page_size
        digests = request.digests(self.stepper.page_size)[:findable]
        for number, row in self._free_rows():
            pool = self.pools[number]
            shared = pool.lookup(digests)
            # A page for each of the running ones to grow into, or somebody is evicted right away.
            spare = sum(r is not None for r in self._rows_of(number))
            if pool.available < count - len(shared) + spare:
                pool.release(shared)
                continue
            del self._waiting[0]
            request.place = (number, row)
            request.pages = shared + pool.allocate(count - len(shared))
            request.stored = len(shared) * pool.page_size
            if request.cached_tokens is None:
                request.cached_tokens = request.stored
            self._rows[row] = self._prefilling = request
            return request
        return None

    def _free_rows(self):
        """A free row of each pool that has one, the pool with most pages available first."""
        order = sorted(range(len(self.pools)), key=lambda i: -self.pools[i].available)
        for number in order:
            rows = self._rows_of(number)
            if None in rows:
                yield number, number * self._per_pool + rows.index(None)

    def _rows_of(self, number):
        return self._rows[number * self._per_pool : (number + 1) * self._per_pool]

    def _decode_rows(self):
        for request in sorted(self._active(), key=lambda r: r.number):
            if request.place is not None and request is not self._prefilling:
                self._grow(request)
        running = [r for r in self._active() if r is not self._prefilling]
        if not running:
            return
        stepper = self.stepper
        tokens = np.zeros(stepper.max_batch, np.int32)
        tables = np.zeros((stepper.max_batch, stepper.max_blocks), np.int32)
        lengths = np.zeros(stepper.max_batch, np.int32)
        for request in running:
            _, row = request.place
            tokens[row] = request.tokens[-1]
            tables[row] = self._table(request)
            lengths[row] = len(request.tokens)
        try:
            logits = stepper.decode(tokens, tables, lengths)
        except Exception as error:  # whose fault it is cannot be told
            for request in running:
                self._finish(request, "error", error)
            # What the step left in the pages is not known.
            for pool in self.pools:
                pool.forget()
            if self._prefilling is not None:
                self._evict(self._prefilling)
            return
        for request in running:
            _, row = request.place
            self._stored(request, len(request.tokens))
            self._take(request, logits[row])

    def _grow(self, request):
        """A page for the next token, if it needs one; evicts the youngest until there is."""
        pool = self.pools[request.place[0]]
        while len(request.pages) * pool.page_size < len(request.tokens):
            try:
                request.pages += pool.allocate()
            except OutOfPages:
                rows = self._rows_of(request.place[0])
                youngest = max((r for r in rows if r is not None), key=lambda r: r.number)
                self._evict(youngest)
                if youngest is request:
                    return

    def _evict(self, request):
        self._vacate(request)
        request.evictions += 1
        self.evictions += 1
        bisect.insort(self._waiting, request, key=lambda r: r.number)

    def _vacate(self, request):
        """Takes row and pages away from a request."""
        number, row = request.place
        self.pools[number].release(request.pages)
        request.pages, request.place, request.stored = [], None, 0
        self._rows[row] = None
        if self._prefilling is request:
            self._prefilling = None

    def _finish(self, request, reason, error=None):
        if request.place is not None:
            self._vacate(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        if request.finish_reason is None:
            request.end(reason, error)

    def _stored(self, request, count):
        """`count` of its tokens have their rows now: full pages may be shared."""
        size = self.stepper.page_size
        digests = request.digests(size)
        pool = self.pools[request.place[0]]
        for i in range(request.stored // size, count // size):
            pool.publish(request.pages[i], digests[i])
        request.stored = count

    def _take(self, request, logits):
        """Chooses the next token of a request and hands it on."""
        try:
            token = sample(logits, request.options.sampling, request.generator)
            request.append(token, self.eos, self.limit)
        except Exception as error:  # one request's error is not the others'
            self._finish(request, "error", error)
            return
        if request.finish_reason is not None:
            self._finish(request, request.finish_reason)

    def _table(self, request):
        table = np.zeros(self.stepper.max_blocks, np.int32)
        table[: len(request.pages)] = request.pages
        return table
