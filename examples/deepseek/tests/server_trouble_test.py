"""The HTTP endpoint's clients that hang up, a model that fails, and the server's end."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
from absl.testing import absltest, parameterized

from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.runner_test import wait_until
from examples.deepseek.tests.server_cases import IMPATIENT, ServerCase


class TroubleTest(ServerCase):
    @parameterized.product(stream=(True, False), when=("at once", "later"))
    def test_a_client_that_hangs_up(self, stream, when):
        self.stepper.seconds = 0.02
        data = json.dumps(
            {"prompt": "x", "stream": stream, "max_tokens": 380, "ignore_eos": True}
        ).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        with socket.create_connection(self.address, timeout=20) as connection:
            connection.sendall(head + data)
            wait_until(lambda: self.engine.counts["pages_held"] > 0)
            if when == "later":
                if stream:
                    self.assertIn(b"200 OK", connection.recv(1000))
                wait_until(lambda: self.engine.counts["pages_held"] > 1)
        # The 380 tokens would take 8 seconds.
        wait_until(lambda: self.engine.counts["pages_held"] == 0, seconds=5)
        self.stepper.seconds = 0
        self.assert_serves()

    def test_a_client_that_hangs_up_while_it_waits(self):
        self.stepper.seconds = 0.02
        body = {"prompt": "x", "stream": True, "max_tokens": 390, "ignore_eos": True}
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # all rows
                stack.enter_context(self.client.stream("POST", "/v1/completions", json=body))
            with self.assertRaises(httpx.ReadTimeout):
                self.client.post("/v1/completions", json=body | {"stream": False}, timeout=0.3)
            wait_until(lambda: self.engine.counts["waiting"] == 0, seconds=5)
            self.assertEqual(self.engine.counts["running"], 4)
        self.stepper.seconds = 0
        self.assert_serves()

    def test_many_clients_some_of_which_hang_up(self):
        rng = np.random.default_rng()
        prompts = [rng.integers(0, 256, rng.integers(1, 60)).tolist() for _ in range(150)]
        leaves = rng.random(150) < 0.3

        async def ask(client, gate, i):
            body = {"prompt": prompts[i], "temperature": 0.9, "seed": i, "max_tokens": 50}
            async with gate:
                if leaves[i]:
                    with contextlib.suppress(httpx.TimeoutException):
                        await client.post("/v1/completions", json=body, timeout=0.02)
                    return None
                while True:
                    response = await client.post("/v1/completions", json=body)
                    if response.status_code != 429:
                        return response
                    await asyncio.sleep(0.02)

        async def main():
            gate = asyncio.Semaphore(20)
            async with httpx.AsyncClient(base_url=self.client.base_url, timeout=30) as client:
                return await asyncio.gather(*[ask(client, gate, i) for i in range(150)])

        self.stepper.seconds = 0.001
        answers = asyncio.run(main())
        for i, response in enumerate(answers):
            if response is not None:
                self.assertEqual(response.status_code, 200, response.text)
                text, reason, count = self.want(prompts[i], 50, sampling=Sampling(0.9, 1.0, i))
                (choice,) = response.json()["choices"]
                self.assertEqual((choice["text"], choice["finish_reason"]), (text, reason))
                self.assertEqual(response.json()["usage"]["completion_tokens"], count)
        self.assert_serves()

    def test_a_failing_model(self):
        def fail(*operands):
            raise RuntimeError("out of luck")

        prefill, self.stepper.prefill = self.stepper.prefill, fail
        response = self.post(prompt="x")
        self.assertEqual(response.status_code, 500)
        self.assertRegex(response.json()["error"]["message"], "out of luck")
        (event,) = self.events(prompt="x")
        self.assertRegex(event["error"]["message"], "out of luck")
        self.assertEqual(event["error"]["type"], "server_error")
        self.stepper.prefill = prefill
        self.assert_serves()

    def test_a_closed_engine(self):
        self.runner.close()
        self.assertEqual(self.post(prompt="x").status_code, 503)
        self.assertEqual(self.client.get("/health").status_code, 503)

    def test_an_engine_that_closes_under_a_request(self):
        self.stepper.seconds = 0.02
        threading.Timer(0.3, self.runner.close).start()
        response = self.post(prompt="x", max_tokens=390, ignore_eos=True)
        self.assertEqual(response.status_code, 503)
        self.assertRegex(response.json()["error"]["message"], "closed before the request was done")

    def test_shutdown_while_a_request_runs(self):
        self.stepper.seconds = 0.05
        body = {"prompt": "x", "stream": True, "max_tokens": 390, "ignore_eos": True}
        begin = time.monotonic()
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            self.client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            self.server.should_exit = True
            for _ in lines:
                pass
        wait_until(lambda: self.runner.closed)
        self.assertLess(time.monotonic() - begin, 10)  # the request would take 20 seconds
        wait_until(lambda: self.engine.counts["pages_held"] == 0)


class SlowClientsTest(ServerCase):
    limits = IMPATIENT

    def test_bodies_that_do_not_arrive(self):
        with socket.create_connection(self.address, timeout=20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            self.assertIn(b" 408 ", connection.recv(100))
        self.assert_serves()

    @parameterized.parameters(True, False)
    def test_a_client_that_does_not_read(self, stream):
        """By the ASGI application alone: a socket's buffers hold more than an answer."""
        body = json.dumps({"prompt": "x", "stream": stream}).encode()

        async def main():
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                return messages.pop() if messages else await asyncio.Event().wait()

            async def send(message):
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()

            scope = {
                "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
                "query_string": b"", "root_path": "",
            }  # fmt: skip
            begin = time.monotonic()
            await self.app(scope, receive, send)
            self.assertLen(asyncio.all_tasks(), 1)  # nothing waits for this client any more
            return time.monotonic() - begin

        self.assertLess(asyncio.run(main()), IMPATIENT.send_seconds + 10)
        self.assert_serves()


class ProcessTest(parameterized.TestCase):
    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    def test_signals_end_the_process(self, number):
        script = (
            "from unittest import mock\n"
            "from examples.deepseek import load, server\n"
            "from examples.deepseek.tests import fake_stepper, toy_tokenizer\n"
            "config = mock.Mock(max_position_embeddings=1000)\n"
            "stepper = fake_stepper.FakeStepper(vocab_size=258)\n"
            "made = stepper, toy_tokenizer.toy_tokenizer(), config\n"
            "with mock.patch.object(load, 'load', lambda *_, **__: made):\n"
            "    server.main(['--model', 'toy', '--port', '0', '--grace', '1'])\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
        ) as process:
            self.addCleanup(process.kill)
            line = next(line for line in process.stderr if "running on" in line)
            address = line.split("running on ")[1].split()[0]
            answer = httpx.post(f"{address}/v1/completions", json={"prompt": "x"}, timeout=20)
            self.assertEqual(answer.status_code, 200)
            process.send_signal(number)
            _, rest = process.communicate(timeout=20)
        self.assertIn("shutdown complete", rest)
        self.assertNotIn("Traceback", rest)
        self.assertIn(process.returncode, (0, -number))


if __name__ == "__main__":
    absltest.main()
