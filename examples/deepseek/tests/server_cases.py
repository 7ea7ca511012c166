"""A real server over a fake model, and a client."""

import dataclasses
import json
import threading
import time

import httpx
import uvicorn
from absl.testing import parameterized

from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import Sampling
from examples.deepseek.server import Limits, make_app
from examples.deepseek.tests.fake_stepper import FakeStepper, generate, make_engine
from examples.deepseek.tests.runner_test import wait_until
from examples.deepseek.tests.toy_tokenizer import VOCAB_SIZE, toy_tokenizer
from examples.deepseek.tokenization import Text

LIMITS = Limits(body_bytes=5000, concurrent_requests=6)
IMPATIENT = dataclasses.replace(LIMITS, body_seconds=0.5, send_seconds=0.5)


class PacedStepper(FakeStepper):
    """Takes `seconds` for each decode, so that there is time to do something meanwhile."""

    seconds = 0.0

    def decode(self, *operands):
        time.sleep(self.seconds)
        return super().decode(*operands)


class ServerCase(parameterized.TestCase):
    template = None
    limits = LIMITS

    def setUp(self):
        super().setUp()
        self.stepper = PacedStepper(
            page_size=8, num_pages=100, max_blocks=50, prefill_chunk=32, vocab_size=VOCAB_SIZE
        )
        self.text = Text(toy_tokenizer(self.template))
        self.engine = make_engine(self.stepper, decode=self.text.decode, eos=self.text.eos)
        self.runner = Runner(self.engine)
        self.app = make_app(self.runner, self.text, "toy", self.limits)
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="critical", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=self.server.run)
        thread.start()
        self.addCleanup(thread.join, 20)
        self.addCleanup(setattr, self.server, "should_exit", True)
        wait_until(lambda: self.server.started)
        self.address = self.server.servers[0].sockets[0].getsockname()[:2]
        host, port = self.address
        self.client = self.enterContext(httpx.Client(base_url=f"http://{host}:{port}", timeout=20))

    def post(self, path="/v1/completions", **body):
        return self.client.post(path, json=body)

    def want(self, prompt, max_tokens=16, stop=(), sampling=None):
        """The text and the finish reason that the model gives."""
        options = Options(max_tokens, sampling or Sampling())
        tokens, reason = generate(
            self.stepper.model, prompt, options, self.engine.eos, self.engine.limit
        )
        return self.text.decode(tokens), reason, len(tokens)

    def events(self, path="/v1/completions", **body):
        """The objects of a streamed answer, which must end with [DONE]."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            self.assertEqual(response.status_code, 200)
            self.assertStartsWith(response.headers["content-type"], "text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        self.assertTrue(all(line.startswith("data: ") for line in lines), lines)
        self.assertEqual(lines.pop(), "data: [DONE]")
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def assert_idle(self):
        wait_until(lambda: self.client.get("/health").json()["requests"] == 0)
        wait_until(lambda: self.engine.counts["running"] == 0)
        counts = self.engine.counts
        self.assertEqual((counts["waiting"], counts["pages_held"]), (0, 0))

    def assert_serves(self):
        prompt = self.text.encode("still here?")
        answer = self.post(prompt="still here?", temperature=0).json()
        self.assertEqual(answer["choices"][0]["text"], self.want(prompt)[0])
        self.assert_idle()
