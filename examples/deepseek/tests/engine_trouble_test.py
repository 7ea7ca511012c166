"""The engine's texts and seeds; cancellation at any time, and failures of everything around it."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek.request import Options
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.engine_cases import EngineCase, Reader
from examples.deepseek.tests.fake_stepper import (
    POISON,
    FakeStepper,
    assert_books_agree,
    generate,
    make_engine,
)


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

        stepper = Failing(max_batch=3)
        engine = make_engine(stepper)
        prompt = self.prompt(8)
        readers = [self.start(engine, prompt, max_tokens=5) for _ in range(2)]
        half = self.start(engine, self.prompt(15), max_tokens=5)
        late = self.start(engine, prompt, max_tokens=5)
        while half.request.stored == 0:
            engine.step()
        stepper.fail = True
        engine.step()
        assert_books_agree(engine)
        stepper.fail = False
        self.assertEmpty(half.tokens)
        self.run_all(engine)
        for reader in readers:
            self.assertEqual(reader.finish_reason, "error")
            self.assertRegex(str(reader.error), "lost its way")
        # The pages that the failed step left are not used again.
        self.assertEqual(late.request.cached_tokens, 0)
        self.assert_right(engine, half, late)

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
