"""What the tests of the engine share: a reader of events, and checks of what it read."""

import numpy as np
from absl.testing import parameterized

from examples.deepseek.request import Options
from examples.deepseek.tests.fake_stepper import assert_books_agree, generate


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
