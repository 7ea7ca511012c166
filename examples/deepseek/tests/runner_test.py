"""The engine's thread: readers in other threads and in event loops, and its end."""

import asyncio
import threading
import time

import numpy as np
from absl.testing import absltest

from examples.deepseek.errors import EngineClosedError, InvalidRequestError
from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.fake_stepper import FakeStepper, generate, make_engine
from examples.deepseek.tests.soak_test import draw_requests


class SlowStepper(FakeStepper):
    """Takes a while for each decode."""

    def decode(self, *operands):
        time.sleep(0.005)
        return super().decode(*operands)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


class RunnerTest(absltest.TestCase):
    def run_engine(self, stepper=None, **arguments):
        runner = Runner(make_engine(stepper or FakeStepper(), **arguments))
        self.addCleanup(runner.close)
        return runner

    def assert_idle(self, runner):
        wait_until(lambda: runner.engine.counts["running"] == 0)
        counts = runner.engine.counts
        self.assertEqual((counts["waiting"], counts["pages_held"]), (0, 0))

    def test_threads_read_their_own_streams(self):
        runner = self.run_engine(FakeStepper(num_pages=14))
        rng = np.random.default_rng()
        requests = list(draw_requests(rng, 60, runner.engine.limit))
        answers = {}

        def read(i):
            with runner.stream(*requests[i]) as stream:
                answers[i] = [token for event in stream for token in event.tokens]

        threads = [threading.Thread(target=read, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for i, request in enumerate(requests):
            want, _ = generate(runner.engine.stepper.model, *request, limit=runner.engine.limit)
            self.assertEqual(answers[i], want)
        self.assert_idle(runner)

    def test_coroutines_read_their_own_streams_and_some_leave(self):
        runner = self.run_engine(FakeStepper(num_pages=14))
        rng = np.random.default_rng()
        requests = list(draw_requests(rng, 200, runner.engine.limit))
        leaves = rng.random(len(requests)) < 0.3

        async def read(i):
            tokens = []
            with runner.async_stream(*requests[i]) as stream:
                async for event in stream:
                    tokens += event.tokens
                    if leaves[i] and rng.random() < 0.3:
                        break
            return tokens

        async def main():
            return await asyncio.gather(*map(read, range(len(requests))))

        for got, leaving, request in zip(asyncio.run(main()), leaves, requests, strict=True):
            want, _ = generate(runner.engine.stepper.model, *request, limit=runner.engine.limit)
            self.assertEqual(got, want[: len(got)] if leaving else want)
        self.assert_idle(runner)

    def test_leaving_a_stream_frees_its_pages(self):
        runner = self.run_engine(SlowStepper(max_blocks=100, num_pages=100))
        with runner.stream([1, 2, 3], Options(sampling=Sampling())) as stream:
            next(iter(stream))
            self.assertGreater(runner.engine.counts["pages_held"], 0)
        self.assert_idle(runner)
        self.assertEqual(stream.request.finish_reason, "cancelled")
        self.assertLess(len(stream.request.generated), 390)

    def test_a_loop_that_is_gone_loses_only_its_requests(self):
        runner = self.run_engine(SlowStepper(max_blocks=16, num_pages=40))

        async def leave():
            return runner.async_stream([1, 2, 3], Options())

        left = asyncio.run(leave())
        with runner.stream([4, 5], Options(max_tokens=12)) as stream:
            tokens = [token for event in stream for token in event.tokens]
        model = runner.engine.stepper.model
        self.assertEqual(tokens, generate(model, [4, 5], Options(max_tokens=12))[0])
        self.assert_idle(runner)
        self.assertEqual(left.request.finish_reason, "error")

    def test_close_ends_all_requests(self):
        runner = self.run_engine(SlowStepper(max_batch=2, max_blocks=100, num_pages=100))
        streams = [runner.stream([1, 2, i], Options()) for i in range(5)]
        next(iter(streams[0]))
        runner.close()
        for stream in streams:
            *_, last = stream
            self.assertEqual(last.finish_reason, "error")
            self.assertIsInstance(last.error, EngineClosedError)
        self.assertEqual(runner.engine.counts["pages_held"], 0)
        with self.assertRaisesRegex(EngineClosedError, "no longer runs"):
            runner.stream([1], Options())
        runner.close()

    def test_a_thread_that_fails_leaves_nobody_waiting(self):
        hook, told = threading.excepthook, []
        threading.excepthook = lambda arguments: told.append(arguments.exc_type)
        self.addCleanup(setattr, threading, "excepthook", hook)
        runner = self.run_engine()

        def fail():
            raise ZeroDivisionError("a mistake in the engine")

        runner.engine._prefill = fail
        stream = runner.stream([1], Options())
        (event,) = stream
        self.assertRegex(str(event.error), "a mistake in the engine")
        wait_until(lambda: told == [ZeroDivisionError])  # with its traceback, for the log
        self.assertTrue(runner.closed)
        with self.assertRaises(EngineClosedError):
            runner.stream([1], Options())

    def test_books_that_do_not_agree_leave_nobody_waiting(self):
        hook = threading.excepthook
        threading.excepthook = lambda arguments: None
        self.addCleanup(setattr, threading, "excepthook", hook)
        runner = self.run_engine(SlowStepper(max_blocks=100, num_pages=100))
        streams = [runner.stream([1, 2, i], Options()) for i in range(3)]
        wait_until(lambda: runner.engine.counts["running"] == 3)

        def fail(pages):
            raise ValueError("a page that nobody holds")

        runner.engine.pools[0].release = fail
        streams[1].cancel()
        wait_until(lambda: all(stream.request.finish_reason for stream in streams), seconds=5)
        for stream in streams:
            *_, last = stream
            self.assertRegex(str(last.error), "a page that nobody holds")

    def test_refusals_come_at_once(self):
        runner = self.run_engine()
        with self.assertRaisesRegex(InvalidRequestError, "prompt: "):
            runner.stream([], Options())
        self.assert_idle(runner)


if __name__ == "__main__":
    absltest.main()
