"""2,000 requests through a pool that is much too small, cancelled at random.

The seed is drawn anew each time, and named by a failure.
"""

import secrets

import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek.request import Options
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.fake_stepper import (
    FakeStepper,
    assert_books_agree,
    generate,
    make_engine,
)

REQUESTS = 2000


def draw_requests(rng, count, limit):
    """Prompts and options; half of the prompts begin like others."""
    prefixes = [rng.integers(0, 97, rng.integers(8, limit // 2)).tolist() for _ in range(3)]
    for i in range(count):
        prompt = rng.integers(0, 97, rng.integers(1, limit // 2)).tolist()
        if rng.random() < 0.5:
            prompt = prefixes[rng.integers(3)] + prompt[: rng.integers(1, 8)]
        sampling = Sampling(float(rng.choice([0, 0.7, 1])), float(rng.choice([0.8, 1])), seed=i)
        max_tokens = int(rng.integers(1, 30)) if rng.random() < 0.9 else None
        yield prompt, Options(max_tokens, sampling, ignore_eos=bool(rng.random() < 0.3))


class SoakTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    def test_no_page_leaks_and_every_token_is_right(self, pools):
        seed = secrets.randbits(32)
        rng = np.random.default_rng(seed)
        stepper = FakeStepper(
            page_size=4, num_pages=20, max_blocks=12, max_batch=6 * pools, prefill_chunk=7,
            pools=pools,
        )  # fmt: skip
        engine = make_engine(stepper, eos=[3, 50])
        requests = list(draw_requests(rng, REQUESTS, engine.limit))
        events = [[] for _ in requests]
        handles = []
        steps = 0
        with self.subTest(seed=seed):
            while True:
                if len(handles) < len(requests) and engine.counts["waiting"] < 20:
                    for _ in range(rng.integers(0, 12)):
                        if len(handles) < len(requests):
                            i = len(handles)
                            handles.append(engine.submit(*requests[i], events[i].append))
                            if rng.random() < 0.05:
                                engine.cancel(handles[i])
                if handles and rng.random() < 0.07:
                    engine.cancel(handles[-1 - rng.integers(min(len(handles), 30))])
                more = engine.step()
                steps += 1
                assert_books_agree(engine)
                if not more and len(handles) == len(requests):
                    break
                self.assertLess(steps, 100 * REQUESTS)

            self.assertEqual(engine.counts["pages_held"], 0)
            reasons = {}
            for handle, told, (prompt, options) in zip(handles, events, requests, strict=True):
                reason = told[-1].finish_reason
                reasons[reason] = reasons.get(reason, 0) + 1
                self.assertEqual(sum(e.finish_reason is not None for e in told), 1)
                tokens = [token for event in told for token in event.tokens]
                want, want_reason = generate(
                    stepper.model, prompt, options, engine.eos, engine.limit
                )
                if reason == "cancelled":
                    self.assertTrue(handle.cancelled)
                    self.assertEqual(tokens, want[: len(tokens)])
                    self.assertLess(len(tokens), len(want))
                else:
                    self.assertEqual((tokens, reason), (want, want_reason))

            # It was a soak: everything that can happen did, many times.
            evicted = sum(handle.evictions > 0 for handle in handles)
            shared = sum(bool(handle.cached_tokens) for handle in handles)
            print(f"{steps} steps, {engine.evictions} evictions, {evicted=}, {shared=}, {reasons}")
            self.assertGreater(evicted, 100)
            self.assertGreater(shared, 200)
            self.assertGreater(min(reasons[r] for r in ("stop", "length", "cancelled")), 100)
            self.assertGreater(steps, 500)


if __name__ == "__main__":
    absltest.main()
