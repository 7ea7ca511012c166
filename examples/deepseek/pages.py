"""The pages of one pool: who holds them, which are free, and which hold a prefix worth keeping.

A full page can be shared by all sequences whose tokens are equal up to its end, since its rows
depend on those tokens only. Pages are known by a digest of the tokens up to their end: a chain, one
link per page, as in vLLM's automatic prefix caching. The digest is cryptographic, so that no prompt
can be made up whose pages pass for another's.

A page is in one of three states:

  held    one or more sequences have a reference;
  kept    nobody has one, but its digest is known: it is found again by `lookup`, or reclaimed,
          least recently used first, when free pages run out;
  free    its contents mean nothing.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class OutOfPages(Exception):  # noqa: N818, an everyday event and not a fault
    """Fewer pages than asked for are free or reclaimable."""


class PagePool:
    """Page ids `0..num_pages-1`, with a reference count each. Not thread-safe."""

    def __init__(self, num_pages: int, page_size: int):
        """Starts with `num_pages` free pages of `page_size` tokens."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"expected at least one page of at least one token, got {num_pages} of {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._free = collections.deque(range(num_pages))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that somebody has a reference to."""
        return self.num_pages - self.available

    def allocate(self, count: int = 1) -> list[int]:
        """Hands out `count` pages with one reference each, whose contents mean nothing.

        Raises:
          OutOfPages: there are not so many; none is handed out then.
        """
        if count > self.available:
            raise OutOfPages(f"expected {count} pages to be available, got {self.available}")
        while len(self._free) < count:
            page, _ = self._kept.popitem(last=False)
            self._discard(page)
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def lookup(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of a chain, with a reference more each."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._kept.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Makes a full page findable. Of two pages with one digest the first stays known.

        Raises:
          ValueError: nobody holds the page, or it has another digest.
        """
        self._check_held(page)
        if self._digest_of.get(page, digest) != digest:
            raise ValueError(f"page {page}: published already, with another digest")
        if self._page_of.setdefault(digest, page) == page:
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one reference for each of a sequence's pages, given in the sequence's order.

        Raises:
          ValueError: nobody holds one of them (those after it are released already).
        """
        # Last page first: of the pages kept, a chain's end must be reclaimed before its beginning,
        # without which it is never found.
        for page in reversed(pages):
            self._check_held(page)
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._kept[page] = None
                else:
                    self._discard(page)

    def forget(self) -> None:
        """Makes no page findable any more; those held stay with their holders."""
        for page in self._kept:
            self._discard(page)
        self._kept.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def _discard(self, page):
        """The page's contents mean nothing from here on."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
        self._free.append(page)

    def _check_held(self, page):
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page: expected 0 to {self.num_pages - 1}, got {page}")
        if self._references[page] < 1:
            raise ValueError(f"page {page}: expected one that is held, and nobody holds it")


def extend_chain(chain: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Appends to `chain` the digests that `tokens` has full pages for, and `chain` not yet.

    Args:
      chain: digests of the first pages of `tokens`, changed in place.
      tokens: the sequence from its start, ids below 2**63.
      page_size: tokens of a page.
    """
    for i in range(len(chain), len(tokens) // page_size):
        digest = hashlib.blake2b(chain[-1] if chain else b"", digest_size=16)
        digest.update(np.asarray(tokens[i * page_size : (i + 1) * page_size], "<i8").tobytes())
        chain.append(digest.digest())
