"""The engine's rules, token by token against a direct computation, with a fake model."""

from absl.testing import absltest, parameterized

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.request import Options
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.engine_cases import EngineCase, Reader
from examples.deepseek.tests.fake_stepper import FakeStepper, make_engine


class EngineTest(EngineCase):
    @parameterized.parameters(1, 2, 3, 4, 5, 6, 7, 12, 13, 30, 31)
    def test_one_request_of_any_length(self, length):
        engine = make_engine(FakeStepper())
        reader = self.start(engine, self.prompt(length), max_tokens=20)
        self.run_all(engine)
        self.assert_right(engine, reader)

    def test_many_requests_of_different_lengths(self):
        engine = make_engine(FakeStepper(num_pages=64))
        readers = []
        for _ in range(30):
            sampling = Sampling(self.rng.choice([0.0, 1.0]), 0.9, int(self.rng.integers(1000)))
            length, count = self.rng.integers(1, 16, 2)
            readers.append(
                self.start(engine, self.prompt(length), max_tokens=int(count), sampling=sampling)
            )
            engine.step()
        self.run_all(engine)
        self.assertEqual(engine.evictions, 0)
        self.assert_right(engine, *readers)
        # Several sequences shared most decodes.
        tokens = sum(len(reader.tokens) - 1 for reader in readers)
        self.assertLess(engine.stepper.decodes, tokens / 2)

    def test_tokens_are_streamed_as_they_come(self):
        engine = make_engine(FakeStepper())
        reader = self.start(engine, self.prompt(3), max_tokens=4)
        counts = []
        while engine.step():
            counts.append(len(reader.tokens))
        self.assertEqual(counts, [2, 3])  # the prefill's token and the first decode's in one step
        self.assertEqual([len(event.tokens) for event in reader.events], [1] * 4)

    def test_long_prompts_are_prefilled_in_chunks_between_decodes(self):
        engine = make_engine(FakeStepper(max_blocks=16, num_pages=64))
        first = self.start(engine, self.prompt(2), max_tokens=30)
        engine.step()
        second = self.start(engine, self.prompt(40), max_tokens=3)
        before = len(first.tokens)
        for _ in range(6):  # chunks of 6: seven of them
            engine.step()
            self.assertEmpty(second.tokens)
        engine.step()
        self.assertLen(second.tokens, 2)
        self.assertEqual(len(first.tokens) - before, 7)
        self.run_all(engine)
        self.assert_right(engine, first, second)

    def test_several_short_prompts_fit_into_one_step(self):
        engine = make_engine(FakeStepper())
        readers = [self.start(engine, self.prompt(2), max_tokens=5) for _ in range(4)]
        engine.step()
        self.assertEqual([len(r.tokens) for r in readers], [2, 2, 2, 0])
        self.run_all(engine)
        self.assert_right(engine, *readers)

    def test_first_come_first_served(self):
        engine = make_engine(FakeStepper(max_batch=1))
        readers = [self.start(engine, self.prompt(5), max_tokens=2) for _ in range(3)]
        self.run_all(engine)
        order = []
        engine = make_engine(FakeStepper(max_batch=1))
        for i, reader in enumerate(readers):
            engine.submit(reader.prompt, reader.options, lambda event, i=i: order.append(i))
        self.run_all(engine)
        self.assertEqual(order, [0, 0, 1, 1, 2, 2])

    @parameterized.parameters(1, 2)
    def test_eviction_loses_and_repeats_nothing(self, pools):
        # Each grows to 8 pages, and a pool has 9 for 4 of them.
        stepper = FakeStepper(num_pages=9, max_batch=4 * pools, pools=pools)
        engine = make_engine(stepper)
        readers = [
            self.start(engine, self.prompt(3), sampling=Sampling(1.0, 0.9, seed))
            for seed in range(6 * pools)
        ]
        self.run_all(engine)
        self.assertGreater(engine.evictions, 3)
        self.assertEqual(engine.evictions, sum(r.request.evictions for r in readers))
        self.assertEqual(readers[0].request.evictions, 0)  # the oldest never
        self.assert_right(engine, *readers)

    def test_all_pools_are_used(self):
        stepper = FakeStepper(num_pages=9, max_batch=4, pools=2)
        engine = make_engine(stepper)
        readers = [self.start(engine, self.prompt(3), max_tokens=8) for _ in range(4)]
        for _ in range(3):
            engine.step()
        # Each to the pool with most pages.
        self.assertEqual([reader.request.place[0] for reader in readers], [0, 1, 0, 1])
        self.run_all(engine)
        self.assert_right(engine, *readers)

    def test_admission_leaves_the_running_a_page_to_grow_into(self):
        engine = make_engine(FakeStepper(num_pages=4))
        readers = [self.start(engine, self.prompt(7), max_tokens=4) for _ in range(2)]
        engine.step()
        # Two pages are free, as many as the second prompt needs; the first would take one next.
        self.assertEqual(engine.counts["waiting"], 1)
        self.assertEqual(engine.counts["pages_held"], 2)
        self.run_all(engine)
        self.assertEqual(engine.evictions, 0)
        self.assert_right(engine, *readers)

    def test_an_evicted_request_finds_its_pages_again(self):
        stepper = FakeStepper(num_pages=12, max_batch=2)
        engine = make_engine(stepper)
        readers = [self.start(engine, self.prompt(3)) for _ in range(2)]
        while not engine.evictions:
            engine.step()
        length = len(readers[1].request.tokens)
        self.assertGreater(length, 20)
        self.run_all(engine)
        self.assertEqual(engine.evictions, 1)
        # Of its six pages, all full, the other took two.
        self.assertEqual(stepper.prefilled, 3 + 3 + length - 4 * stepper.page_size)
        self.assert_right(engine, *readers)

    def test_full_pages_of_a_prefix_are_shared(self):
        stepper = FakeStepper(num_pages=40)
        engine = make_engine(stepper)
        prefix = self.prompt(13)  # three pages and a token
        readers = [
            self.start(
                engine, prefix + self.prompt(3), max_tokens=9, sampling=Sampling(1.0, 1.0, i)
            )
            for i in range(4)
        ]
        self.run_all(engine)
        self.assertEqual([r.request.cached_tokens for r in readers], [0, 12, 12, 12])
        self.assertEqual(stepper.prefilled, 16 + 3 * 4)
        self.assert_right(engine, *readers)

        # Afterwards, too; and of an equal prompt all but the last token's page.
        again = self.start(engine, readers[0].prompt, max_tokens=9)
        self.run_all(engine)
        self.assertEqual(again.request.cached_tokens, 12)
        self.assert_right(engine, again)

    def test_generated_pages_are_shared_with_the_next_turn(self):
        engine = make_engine(FakeStepper(num_pages=40))
        first = self.start(engine, self.prompt(6), max_tokens=11)
        self.run_all(engine)
        second = self.start(engine, first.prompt + first.tokens + self.prompt(2), max_tokens=5)
        self.run_all(engine)
        self.assertEqual(second.request.cached_tokens, 16)
        self.assert_right(engine, first, second)

    def test_running_requests_share_pages_and_part_ways(self):
        engine = make_engine(FakeStepper(num_pages=10, max_batch=4))
        prompt = self.prompt(20)  # five pages: only shared do four of them fit at a time
        readers = [
            self.start(engine, prompt, max_tokens=4, sampling=Sampling(1.0, 1.0, i))
            for i in range(4)
        ]
        for _ in range(5):
            engine.step()
        self.assertGreater(engine.counts["running"], 1)
        self.run_all(engine)
        self.assert_right(engine, *readers)

    def test_the_whole_pool_for_one_request(self):
        engine = make_engine(FakeStepper(num_pages=3, max_blocks=8))
        self.assertEqual(engine.limit, 12)
        readers = [self.start(engine, self.prompt(11)), self.start(engine, self.prompt(1))]
        self.run_all(engine)
        self.assert_right(engine, *readers)
        self.assertEqual([len(r.tokens) for r in readers], [1, 11])
        self.assertEqual([r.finish_reason for r in readers], ["length", "length"])

    def test_stops_at_the_end_of_sequence(self):
        stepper = FakeStepper(num_pages=64)
        for ignore in (False, True):
            engine = make_engine(stepper, eos=range(0, 97, 5))
            readers = [
                self.start(engine, self.prompt(4), max_tokens=20, ignore_eos=ignore)
                for _ in range(8)
            ]
            self.run_all(engine)
            self.assert_right(engine, *readers)
            reasons = {r.finish_reason for r in readers}
            self.assertEqual(reasons, {"length"} if ignore else reasons | {"stop"})

    def test_model_length_limits_prompt_and_sequence(self):
        engine = make_engine(FakeStepper(num_pages=64), max_tokens=10)
        reader = self.start(engine, self.prompt(9), max_tokens=5)
        other = self.start(engine, self.prompt(4), max_tokens=50)
        self.run_all(engine)
        self.assertEqual((len(reader.tokens), reader.finish_reason), (1, "length"))
        self.assertEqual((len(other.tokens), other.finish_reason), (6, "length"))

    @parameterized.parameters(
        ([], {}, "prompt: expected at least one token"),
        ([1] * 12, {}, "prompt: expected at most 11 tokens.* 12 that .*, got 12"),
        ([1, 97], {}, "prompt: expected token ids below 97, got 97"),
        ([1, -1], {}, "prompt: expected token ids below 97, got -1"),
        ([1], {"stop": ("x",)}, "stop: .*no tokenizer"),
    )
    def test_what_cannot_be_served_is_refused_at_once(self, prompt, options, message):
        engine = make_engine(FakeStepper(num_pages=3))
        with self.assertRaisesRegex(InvalidRequestError, message):
            engine.submit(prompt, Options(**options), Reader())
        self.assertFalse(engine.step())
        self.assert_empty(engine)

    @parameterized.parameters(
        ({"max_tokens": 0}, "max_tokens: expected an integer between 1 and"),
        ({"max_tokens": True}, "max_tokens: .*got True"),
        ({"max_tokens": 2.0}, "max_tokens: .*got 2.0"),
        ({"stop": ("",)}, "stop: expected strings of 1 to 256 characters"),
        ({"stop": (3,)}, "stop: expected strings"),
        ({"stop": ("x",) * 17}, "stop: expected at most 16 strings, got 17"),
    )
    def test_options_are_checked(self, options, message):
        with self.assertRaisesRegex(InvalidRequestError, message):
            Options(**options)


if __name__ == "__main__":
    absltest.main()
