"""Sampling: the distribution it draws from, its limits, and its checks."""

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.sampling import Sampling, sample

finite = st.floats(-(2.0**100), 2.0**100, width=32)
ROUNDING = 2e-5  # of weights in float32, relative: exponents up to 100 are rounded, too
rows = arrays.arrays(np.float32, st.integers(1, 40), elements=finite)


def softmax(logits, temperature):
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    return np.exp(scaled) / np.exp(scaled).sum()


def draw(logits, count, sampling):
    generator = sampling.generator()
    return np.array([sample(logits, sampling, generator) for _ in range(count)])


def in_nucleus(probabilities, token, top_p):
    """Whether those more likely than `token` do not fill the nucleus yet.

    To the rounding of 32 bits, in which `sample` computes: what differs by less is as likely.
    """
    more_likely = probabilities[probabilities > probabilities[token] * (1 + ROUNDING)].sum()
    return more_likely < top_p + ROUNDING


class SamplingTest(parameterized.TestCase):
    @parameterized.parameters((1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.5))
    def test_frequencies(self, temperature, top_p):
        logits = np.array([0.5, 2.0, -1.0, 1.5, 0.0, 1.4], np.float32)
        probabilities = softmax(logits, temperature)
        kept, total = np.zeros(6), 0.0
        for token in np.argsort(-probabilities):
            if total < top_p:
                kept[token] = probabilities[token]
                total += probabilities[token]
        kept /= total
        self.assertEqual((kept > 0).all(), top_p == 1)

        count = 20_000
        drawn = draw(logits, count, Sampling(temperature, top_p, seed=1))
        got = np.bincount(drawn, minlength=6) / count
        # Five standard deviations.
        np.testing.assert_array_less(
            abs(got - kept), 5 * np.sqrt(kept * (1 - kept) / count) + 1e-12
        )

    @settings(max_examples=300, deadline=None)
    @example(np.array([0.0, -(2.0**-24)], np.float32), 2.0, 0.5, 0)  # as likely, in 32 bits
    @given(
        logits=rows,
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_any_logits_give_a_token_of_the_nucleus(self, logits, temperature, top_p, seed):
        sampling = Sampling(temperature, top_p, seed)
        token = sample(logits, sampling, sampling.generator())
        self.assertIsInstance(token, int)
        if temperature == 0:
            self.assertEqual(token, np.argmax(logits))
        elif temperature > 1e-3:
            probabilities = softmax(logits, temperature)
            self.assertGreater(probabilities[token], 0)
            self.assertTrue(in_nucleus(probabilities, token, top_p))
        else:
            self.assertIn(token, range(len(logits)))

    def test_the_largest_random_number(self):
        largest = mock.Mock(**{"random.return_value": 1 - 2**-53})
        for count in range(1, 300):
            logits = np.full(count + 1, 0.3, np.float32)
            logits[-1] = -1e30  # of weight 0
            self.assertEqual(sample(logits, Sampling(1.0), largest), count - 1)

    def test_the_smallest_random_number(self):
        smallest = mock.Mock(**{"random.return_value": 0.0})
        logits = np.array([-1e30, 0.5, 0.5], np.float32)  # the first of weight 0
        self.assertEqual(sample(logits, Sampling(1.0), smallest), 1)

    def test_equals_are_in_the_nucleus_together(self):
        logits = np.repeat(np.array([0, 3, 1], np.float32), 100)
        drawn = draw(logits, 3000, Sampling(1.0, 0.5, 0))
        self.assertEqual(set(drawn), set(range(100, 200)))

    @parameterized.parameters(1e-300, 5e-324, 1e-12)
    def test_temperatures_near_0_are_greedy(self, temperature):
        logits = np.array([1, 3, 2.9999, -1e30], np.float32)
        self.assertEqual(set(draw(logits, 50, Sampling(temperature, 1.0, 0))), {1})

    @parameterized.product(scale=(0.01, 1.0), top_p=(0.1, 0.5, 0.9, 0.999))
    def test_nuclei_of_many_tokens(self, scale, top_p):
        logits = (np.random.default_rng(0).standard_normal(5000) * scale).astype(np.float32)
        probabilities = softmax(logits, 1.0)
        drawn = draw(logits, 400, Sampling(1.0, top_p, seed=1))
        # Where in the nucleus the drawn ones are, by their probability: anywhere, equally likely.
        rank = np.array([probabilities[probabilities > probabilities[t]].sum() for t in drawn])
        self.assertLess(rank.max(), top_p + 1e-5)
        deciles = np.histogram(rank, bins=10, range=(0, top_p + 1e-5))[0]
        np.testing.assert_allclose(deciles, 40, atol=5 * 6)

    def test_a_small_nucleus_is_greedy(self):
        logits = np.random.default_rng().standard_normal(100).astype(np.float32)
        drawn = draw(logits, 50, Sampling(1.0, 1e-9, 0))
        self.assertEqual(set(drawn), {int(logits.argmax())})

    def test_greedy_takes_the_first_of_equals_and_draws_nothing(self):
        sampling = Sampling(seed=3)
        generator = sampling.generator()
        self.assertEqual(sample(np.array([0, 2, 2], np.float32), sampling, generator), 1)
        self.assertEqual(generator.random(), np.random.default_rng(3).random())

    def test_one_number_is_drawn_for_a_token(self):
        logits = np.random.default_rng().standard_normal(9).astype(np.float32)
        for top_p in (1.0, 0.5):
            sampling = Sampling(1.0, top_p, seed=5)
            generator, other = sampling.generator(), np.random.default_rng(5)
            for _ in range(3):
                sample(logits, sampling, generator)
                other.random()
            self.assertEqual(generator.random(), other.random())

    def test_the_logits_are_left_alone(self):
        logits = np.random.default_rng().standard_normal(9).astype(np.float32)
        before = logits.copy()
        draw(logits, 3, Sampling(0.5, 0.5, 0))
        np.testing.assert_array_equal(logits, before)

    @parameterized.product(bad=(np.nan, np.inf, -np.inf), temperature=(0.0, 1.0))
    def test_logits_that_are_not_finite(self, bad, temperature):
        logits = np.array([1, bad, 3], np.float32)
        with self.assertRaisesRegex(FloatingPointError, "NaN or infinite"):
            draw(logits, 1, Sampling(temperature))

    @parameterized.parameters(
        ("temperature", -1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", None),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", [1]),
    )
    def test_values_are_checked(self, field, value):
        with self.assertRaisesRegex(InvalidRequestError, f"^{field}: expected .*, got ") as caught:
            Sampling(**{field: value})
        self.assertEqual(caught.exception.field, field)
        self.assertLess(len(str(caught.exception)), 300)

    def test_numbers_too_long_to_print(self):
        for field in ("temperature", "top_p", "seed"):
            with self.assertRaisesRegex(InvalidRequestError, f"^{field}: .*more than 64 bits"):
                Sampling(**{field: 10**5000})


if __name__ == "__main__":
    absltest.main()
