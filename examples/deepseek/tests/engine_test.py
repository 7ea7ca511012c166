"""The engine, token by token against a direct computation, with a fake model."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek.errors import InvalidRequestError
from examples.deepseek.request import Options
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.fake_stepper import (
    POISON,
    FakeStepper,
    assert_books_agree,
    generate,
    make_engine,
)


class Reader:
    """Keeps what a request's sink is told; after `fail_after` events it raises."""

    def __init__(self, fail_after=10**9):
        self.events = []
        self.fail_after = fail_after

    def __call__(self, event):
        if self.events:
            assert self.events[-1].finish_reason is None, "an event after the last one"
        self.events.append(event)
        if len(self.events) > self.fail_after:
            raise BrokenPipeError("nobody reads")

    @property
    def tokens(self):
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def finish_reason(self):
        return self.events[-1].finish_reason if self.events else None

    @property
    def error(self):
        return self.events[-1].error


class EngineCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng()

    def prompt(self, length):
        return self.rng.integers(0, 97, length).tolist()

    def start(self, engine, prompt, **options):
        reader = Reader()
        reader.prompt, reader.options = prompt, Options(**options)
        reader.request = engine.submit(prompt, reader.options, reader)
        return reader

    def run_all(self, engine, steps=10_000):
        for _ in range(steps):
            more = engine.step()
            assert_books_agree(engine)
            if not more:
                break
        else:
            self.fail(f"not done after {steps} steps: {engine.counts}")
        self.assert_empty(engine)

    def assert_empty(self, engine):
        counts = engine.counts
        self.assertEqual((counts["waiting"], counts["running"], counts["pages_held"]), (0, 0, 0))

    def assert_right(self, engine, *readers):
        for reader in readers:
            model = engine.stepper.model
            want = generate(model, reader.prompt, reader.options, engine.eos, engine.limit)
            self.assertEqual((reader.tokens, reader.finish_reason), want)
            self.assertEqual(reader.request.generated, want[0])


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
        self.assertEqual([pool.held > 0 for pool in engine.pools], [True, True])
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
        ({"stop": ("",)}, "stop: expected strings of 1 to 1000 characters"),
        ({"stop": (3,)}, "stop: expected strings"),
        ({"stop": ("x",) * 17}, "stop: expected at most 16 strings, got 17"),
    )
    def test_options_are_checked(self, options, message):
        with self.assertRaisesRegex(InvalidRequestError, message):
            Options(**options)


def letters(tokens):
    """Token 65 is "A", and so on; those below 32 are bytes of "€": 0, 1, 2 in a row."""
    table = {0: 0xE2, 1: 0x82, 2: 0xAC}
    return bytes(table.get(token, token) for token in tokens).decode("utf-8", "replace")


class Script(FakeStepper):
    """Says what a script has, whatever the prompt: token `i` of the sequence is `script[i]`."""

    def __init__(self, script, **arguments):
        super().__init__(num_pages=64, **arguments)
        self.script = [ord(c) if isinstance(c, str) else c for c in script]

    def _logits(self, length):
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script[length]] = 1
        return logits

    def prefill(self, tokens, start, block_table):
        return self._logits(start + len(tokens))

    def decode(self, tokens, block_table, cache_seqlens):
        return np.stack([self._logits(n) for n in cache_seqlens])


class TextInTheEngineTest(EngineCase):
    def answer(self, script, eos=(), **options):
        engine = make_engine(Script(script), decode=letters, eos=eos)
        reader = self.start(engine, [1], **options)
        self.run_all(engine)
        return reader

    def test_stop_string_across_tokens(self):
        reader = self.answer("_ABCABDABCDEF", stop=("ABCD", "XY"), max_tokens=12)
        self.assertEqual((reader.text, reader.finish_reason), ("ABCABD", "stop"))
        self.assertLen(reader.tokens, 10)
        pieces = [event.text for event in reader.events]
        self.assertEqual(pieces, ["", "", "", "ABC", "", "ABD", "", "", "", ""])

    def test_what_was_held_back_comes_in_the_end(self):
        reader = self.answer("_ABCABC", stop=("ABCD",), max_tokens=6)
        self.assertEqual((reader.text, reader.finish_reason), ("ABCABC", "length"))

    def test_stop_string_with_the_last_token(self):
        reader = self.answer("_ABC", stop=("C",), max_tokens=3)
        self.assertEqual((reader.text, reader.finish_reason), ("AB", "stop"))

    def test_end_of_sequence_has_no_text(self):
        reader = self.answer("_ABC", eos=[ord("C")], max_tokens=9)
        self.assertEqual((reader.text, reader.finish_reason), ("AB", "stop"))
        self.assertEqual(reader.tokens, [65, 66, 67])

    def test_no_half_characters(self):
        reader = self.answer(["_", "A", 0, 1, 2, "B", 0, 1], max_tokens=7)
        self.assertEqual([event.text for event in reader.events][:5], ["A", "", "", "€", "B"])
        self.assertEqual(reader.text, "A€B\ufffd")


class TroubleTest(EngineCase):
    def test_cancelled_at_any_step(self):
        """Waiting, between the chunks of its prompt, while decoding, after the end."""
        prompts = [self.prompt(15) for _ in range(3)]
        for step in range(12):
            engine = make_engine(FakeStepper(max_batch=2))
            readers = [self.start(engine, prompt, max_tokens=5) for prompt in prompts]
            for _ in range(step):
                engine.step()
            for victim in (readers[1], readers[2])[: 1 + step % 2]:
                engine.cancel(victim.request)
                engine.cancel(victim.request)
            self.run_all(engine)
            self.assert_right(engine, readers[0])
            for reader in readers[1:]:
                if reader.request.cancelled and reader.finish_reason == "cancelled":
                    want, _ = generate(engine.stepper.model, reader.prompt, reader.options)
                    self.assertEqual(reader.tokens, want[: len(reader.tokens)])
                else:
                    self.assert_right(engine, reader)

    def test_cancelled_before_the_first_step(self):
        engine = make_engine(FakeStepper())
        reader = self.start(engine, self.prompt(3))
        engine.cancel(reader.request)
        self.run_all(engine)
        self.assertEqual((reader.tokens, reader.finish_reason), ([], "cancelled"))
        self.assertEqual(engine.stepper.prefilled, 0)

    def test_cancelled_while_evicted(self):
        engine = make_engine(FakeStepper(num_pages=9))
        readers = [self.start(engine, self.prompt(3)) for _ in range(4)]
        while not (evicted := [r for r in readers if r.request.evictions and not r.request.place]):
            engine.step()
        engine.cancel(evicted[0].request)
        self.run_all(engine)
        self.assertEqual(evicted[0].finish_reason, "cancelled")
        self.assert_right(engine, *[r for r in readers if r is not evicted[0]])

    def test_failing_prefill_harms_nobody_else(self):
        class Failing(FakeStepper):
            def prefill(self, tokens, start, block_table):
                if 96 in tokens:
                    raise RuntimeError("no such luck")
                return super().prefill(tokens, start, block_table)

        engine = make_engine(Failing())
        good = self.start(engine, [1, 2, 3], max_tokens=5)
        bad = self.start(engine, [1] * 9 + [96] + [1] * 9, max_tokens=5)
        late = self.start(engine, [1] * 9, max_tokens=5)
        self.run_all(engine)
        self.assertEqual((bad.tokens, bad.finish_reason), ([], "error"))
        self.assertRegex(str(bad.error), "no such luck")
        self.assert_right(engine, good, late)

    def test_failing_decode_ends_the_running_and_no_others(self):
        class Failing(FakeStepper):
            fail = False

            def decode(self, tokens, block_table, cache_seqlens):
                if self.fail:
                    self.pages[:] = POISON  # a failed step may leave anything
                    raise RuntimeError("device lost its way")
                return super().decode(tokens, block_table, cache_seqlens)

        stepper = Failing(max_batch=2)
        engine = make_engine(stepper)
        prompt = self.prompt(8)
        readers = [self.start(engine, prompt, max_tokens=5) for _ in range(2)]
        late = self.start(engine, prompt, max_tokens=5)
        for _ in range(3):
            engine.step()
        stepper.fail = True
        engine.step()
        stepper.fail = False
        self.run_all(engine)
        for reader in readers:
            self.assertEqual(reader.finish_reason, "error")
            self.assertRegex(str(reader.error), "lost its way")
        # The pages that the failed step left are not used again.
        self.assertEqual(late.request.cached_tokens, 0)
        self.assert_right(engine, late)

    def test_logits_that_are_not_finite_end_one_request(self):
        class Overflowing(FakeStepper):
            def decode(self, tokens, block_table, cache_seqlens):
                logits = super().decode(tokens, block_table, cache_seqlens)
                logits[1, 5] = np.inf
                return logits

        engine = make_engine(Overflowing(max_batch=3))
        readers = [self.start(engine, self.prompt(2), max_tokens=5) for _ in range(3)]
        self.run_all(engine)
        self.assertEqual(readers[1].finish_reason, "error")
        self.assertIsInstance(readers[1].error, FloatingPointError)
        self.assert_right(engine, readers[0], readers[2])

    @parameterized.parameters(0, 1, 3)
    def test_a_reader_that_raises_loses_only_its_own_request(self, events):
        engine = make_engine(FakeStepper())
        good = self.start(engine, self.prompt(3), max_tokens=9)
        bad = Reader(fail_after=events)
        options = Options(max_tokens=9)
        request = engine.submit(self.prompt(3), options, bad)
        self.run_all(engine)
        self.assert_right(engine, good)
        self.assertLen(request.generated, events + 1)
        self.assertEqual(request.finish_reason, "error")

    def test_a_tokenizer_that_raises_loses_only_that_request(self):
        def decode(tokens):
            if 7 in tokens:
                raise ValueError("no text for 7")
            return "x" * len(tokens)

        engine = make_engine(FakeStepper(num_pages=64, max_blocks=16), decode=decode)
        readers = [self.start(engine, self.prompt(3), max_tokens=40) for _ in range(20)]
        self.run_all(engine)
        for reader in readers:
            want, _ = generate(engine.stepper.model, reader.prompt, reader.options)
            if 7 in want:
                self.assertEqual(reader.finish_reason, "error")
            else:
                self.assert_right(engine, reader)
                self.assertEqual(reader.text, "x" * 40)
        self.assertLen({r.finish_reason for r in readers}, 2)

    def test_abort_ends_everything(self):
        engine = make_engine(FakeStepper(max_batch=2))
        readers = [self.start(engine, self.prompt(9), max_tokens=9) for _ in range(5)]
        for _ in range(3):
            engine.step()
        readers.append(self.start(engine, self.prompt(9)))
        engine.abort(RuntimeError("the end"))
        self.assert_empty(engine)
        assert_books_agree(engine)
        self.assertEqual({reader.finish_reason for reader in readers}, {"error"})


class SeedTest(EngineCase):
    def test_the_same_request_gives_the_same_tokens_in_any_company(self):
        prompt = self.prompt(6)
        options = {"max_tokens": 20, "sampling": Sampling(1.0, 0.95, 1234)}
        answers = []
        for company in (0, 2, 9):
            stepper = FakeStepper(num_pages=11, max_batch=4)
            engine = make_engine(stepper)
            for i in range(company):
                self.start(engine, self.prompt(3), max_tokens=20, sampling=Sampling(1.0, 1.0, i))
            reader = self.start(engine, prompt, **options)
            self.run_all(engine)
            answers.append((reader.tokens, reader.request.evictions > 0))
        self.assertEqual(answers[0][0], answers[1][0])
        self.assertEqual(answers[0][0], answers[2][0])
        self.assertTrue(any(evicted for _, evicted in answers))

    def test_without_a_seed_they_differ(self):
        engine = make_engine(FakeStepper())
        prompt = self.prompt(3)
        sampling = Sampling(temperature=2.0)
        readers = [self.start(engine, prompt, max_tokens=20, sampling=sampling) for _ in range(2)]
        self.run_all(engine)
        self.assertNotEqual(readers[0].tokens, readers[1].tokens)

    def test_options_are_values(self):
        self.assertEqual(Options(), Options(None, Sampling(0.0, 1.0, None)))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            Options().max_tokens = 3


if __name__ == "__main__":
    absltest.main()
