"""The page pool: against a model of it that is a page for every reference, and by example."""

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.deepseek.pages import OutOfPages, PagePool, extend_chain
from examples.deepseek.tests.fake_stepper import assert_pool_consistent

PAGE = 2


def chain_of(tokens):
    chain = []
    extend_chain(chain, tokens, PAGE)
    return chain


class Books:
    """What must be true of a pool whatever is done to it."""

    def __init__(self, num_pages):
        self.pool = PagePool(num_pages, PAGE)
        self.contents = {}  # page -> the tokens up to its end, as its holder wrote them
        self.held = []  # sequences: (tokens, pages)

    def start(self, tokens):
        """As an engine does: finds what it can, allocates the rest, writes, publishes."""
        chain = chain_of(tokens)
        shared = self.pool.lookup(chain)
        for i, page in enumerate(shared):
            assert self.contents[page] == tokens[: (i + 1) * PAGE]
        need = -(-len(tokens) // PAGE) - len(shared)
        others = {page for _, pages in self.held for page in pages}
        available = self.pool.available
        try:
            fresh = self.pool.allocate(need)
        except OutOfPages:
            assert available < need
            assert self.pool.available == available
            self.pool.release(shared)
            return
        assert need <= available
        assert not others.intersection(fresh) and len(set(fresh)) == need
        pages = shared + fresh
        for i in range(len(shared), len(pages)):
            self.contents[pages[i]] = tokens[: (i + 1) * PAGE]
            if i < len(chain):
                self.pool.publish(pages[i], chain[i])
        self.held.append((tokens, pages))

    def stop(self, index):
        if self.held:
            self.pool.release(self.held.pop(index % len(self.held))[1])

    def check(self):
        assert_pool_consistent(self.pool, [pages for _, pages in self.held])
        for tokens, pages in self.held:  # nobody has overwritten them
            for i, page in enumerate(pages):
                assert self.contents[page] == tokens[: (i + 1) * PAGE]


# Few tokens, so that prefixes are often equal.
sequences = st.lists(st.integers(0, 1), min_size=1, max_size=9)
actions = st.one_of(
    st.tuples(st.just("start"), sequences),
    st.tuples(st.just("stop"), st.integers(0, 20)),
    st.tuples(st.just("forget"), st.none()),
)


class PagePoolTest(parameterized.TestCase):
    @settings(max_examples=300, deadline=None)
    @given(num_pages=st.integers(1, 12), done=st.lists(actions, max_size=40))
    def test_no_page_leaks_and_none_is_handed_out_twice(self, num_pages, done):
        books = Books(num_pages)
        for action, argument in done:
            if action == "start":
                books.start(argument)
            elif action == "stop":
                books.stop(argument)
            else:
                books.pool.forget()
            books.check()
        while books.held:
            books.stop(0)
        books.check()
        self.assertEqual(books.pool.available, num_pages)
        self.assertLen(set(books.pool.allocate(num_pages)), num_pages)

    def test_a_prefix_is_found_again_until_its_pages_are_needed(self):
        pool = PagePool(4, PAGE)
        chain = chain_of([1, 2, 3, 4, 5, 6])
        pages = pool.allocate(3)
        for page, digest in zip(pages, chain, strict=True):
            pool.publish(page, digest)
        pool.release(pages)
        self.assertEqual((pool.held, pool.available), (0, 4))

        found = pool.lookup(chain_of([1, 2, 3, 4, 9, 9]))
        self.assertEqual(found, pages[:2])
        pool.release(found)

        # One free page and the end of the chain go first, its beginning last.
        taken = pool.allocate(2)
        self.assertEqual(taken[1], pages[2])
        self.assertEqual(pool.lookup(chain), pages[:2])

    def test_least_recently_used_goes_first(self):
        pool = PagePool(2, PAGE)
        first, second = chain_of([1, 1]), chain_of([2, 2])
        for digest in (first[0], second[0]):
            pages = pool.allocate()
            pool.publish(pages[0], digest)
            pool.release(pages)
        pool.release(pool.lookup(first))
        pool.allocate()
        self.assertLen(pool.lookup(first), 1)
        self.assertEmpty(pool.lookup(second))

    def test_of_two_equal_pages_the_first_stays_known(self):
        pool = PagePool(3, PAGE)
        (digest,) = chain_of([1, 1])
        first, second = pool.allocate(2)
        pool.publish(first, digest)
        pool.publish(second, digest)
        pool.release([second])
        self.assertEqual(pool.lookup([digest]), [first])
        pool.release([first, first])  # the holder's reference, and the lookup's
        assert_pool_consistent(pool, [])

    def test_mistakes_are_errors(self):
        pool = PagePool(3, PAGE)
        with self.assertRaisesRegex(ValueError, "page 1: expected one that is held"):
            pool.release([1])
        with self.assertRaisesRegex(ValueError, "page: expected 0 to 2, got -1"):
            pool.release([-1])
        with self.assertRaisesRegex(ValueError, "page 2: expected one that is held"):
            pool.publish(2, b"digest")
        (page,) = pool.allocate()
        pool.publish(page, b"digest")
        with self.assertRaisesRegex(ValueError, "page 0: published already"):
            pool.publish(page, b"other")
        with self.assertRaisesRegex(OutOfPages, "expected 3 pages to be available, got 2"):
            pool.allocate(3)
        self.assertEqual(pool.available, 2)
        with self.assertRaisesRegex(ValueError, "at least one page"):
            PagePool(0, PAGE)

    @settings(max_examples=200, deadline=None)
    @given(a=sequences, b=sequences)
    def test_digests_are_equal_where_the_tokens_up_to_there_are(self, a, b):
        for i, (x, y) in enumerate(zip(chain_of(a), chain_of(b), strict=False)):
            end = (i + 1) * PAGE
            self.assertEqual(x == y, a[:end] == b[:end])

    def test_a_chain_grows_as_if_made_at_once(self):
        tokens = np.random.default_rng().integers(0, 100_000, 21).tolist()
        chain = []
        for count in range(len(tokens) + 1):
            extend_chain(chain, tokens[:count], PAGE)
            self.assertEqual(chain, chain_of(tokens[:count]))
        self.assertLen(chain, 10)


if __name__ == "__main__":
    absltest.main()
