"""The HTTP endpoint, through a real server and sockets."""

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
import uvicorn
from absl.testing import absltest, parameterized

from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import Sampling
from examples.deepseek.server import Limits, make_app
from examples.deepseek.tests.fake_stepper import FakeStepper, generate, make_engine
from examples.deepseek.tests.runner_test import wait_until
from examples.deepseek.tests.toy_tokenizer import VOCAB_SIZE, toy_tokenizer
from examples.deepseek.tokenization import Text

LIMITS = Limits(body_bytes=5000, concurrent_requests=6, body_seconds=0.5, send_seconds=0.5)
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


class PacedStepper(FakeStepper):
    """Takes `seconds` for each decode, so that there is time to do something meanwhile."""

    seconds = 0.0

    def decode(self, *operands):
        time.sleep(self.seconds)
        return super().decode(*operands)


class ServerCase(parameterized.TestCase):
    template = None

    def setUp(self):
        super().setUp()
        self.stepper = PacedStepper(
            page_size=8, num_pages=100, max_blocks=50, prefill_chunk=32, vocab_size=VOCAB_SIZE
        )
        self.text = Text(toy_tokenizer(self.template))
        self.engine = make_engine(self.stepper, decode=self.text.decode, eos=self.text.eos)
        self.runner = Runner(self.engine)
        self.app = make_app(self.runner, self.text, "toy", LIMITS)
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


class AnswersTest(ServerCase):
    def test_completion(self):
        prompt = self.text.encode("Hello, é")
        response = self.post(prompt="Hello, é", temperature=0, max_tokens=30, model="toy")
        self.assertEqual(response.status_code, 200)
        answer = response.json()
        text, reason, count = self.want(prompt, 30)
        (choice,) = answer["choices"]
        self.assertEqual((choice["text"], choice["finish_reason"]), (text, reason))
        self.assertEqual(answer["object"], "text_completion")
        self.assertEqual(answer["model"], "toy")
        self.assertStartsWith(answer["id"], "cmpl-")
        self.assertEqual(
            answer["usage"],
            {
                "prompt_tokens": 10,  # with <s>, and two bytes for é
                "completion_tokens": count,
                "total_tokens": 10 + count,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        )

    def test_token_ids_seed_and_shared_prefix(self):
        prompt = np.random.default_rng().integers(0, 256, 20).tolist()
        sampling = Sampling(0.8, 0.9, 77)
        for cached in (0, 16):
            answer = self.post(prompt=prompt, temperature=0.8, top_p=0.9, seed=77).json()
            self.assertEqual(answer["choices"][0]["text"], self.want(prompt, sampling=sampling)[0])
            details = answer["usage"]["prompt_tokens_details"]
            self.assertEqual(details["cached_tokens"], cached)

    def test_streamed_completion(self):
        prompt = self.text.encode("Hello")
        events = self.events(prompt="Hello", temperature=0, max_tokens=40)
        text, reason, _ = self.want(prompt, 40)
        self.assertEqual("".join(e["choices"][0]["text"] for e in events), text)
        reasons = [e["choices"][0]["finish_reason"] for e in events]
        self.assertEqual(reasons, [None] * (len(events) - 1) + [reason])
        self.assertLen({e["id"] for e in events}, 1)
        self.assertGreater(len(events), 10)

    def test_pieces_arrive_while_the_model_goes_on(self):
        self.stepper.seconds = 0.02
        body = {"prompt": "Hello", "stream": True, "max_tokens": 60, "ignore_eos": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            self.assertEqual(self.engine.counts["running"], 1)

    def test_chat_without_a_template(self):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ]
        prompt = self.text.encode("Be brief.\n\nUser: Hi\n\nAssistant:")
        body = {"messages": messages, "temperature": 0, "max_completion_tokens": 20}
        answer = self.post("/v1/chat/completions", **body).json()
        text, reason, _ = self.want(prompt, 20)
        (choice,) = answer["choices"]
        self.assertEqual(choice["message"], {"role": "assistant", "content": text})
        self.assertEqual(choice["finish_reason"], reason)
        self.assertEqual(answer["object"], "chat.completion")

        events = self.events("/v1/chat/completions", stream_options={"include_usage": True}, **body)
        first, *pieces, last = events
        self.assertEqual(first["choices"][0]["delta"], {"role": "assistant", "content": ""})
        deltas = [e["choices"][0]["delta"] for e in pieces]
        self.assertEqual("".join(d.get("content", "") for d in deltas), text)
        self.assertEqual(pieces[-1]["choices"][0]["finish_reason"], reason)
        self.assertEqual(last["choices"], [])
        self.assertEqual(last["usage"]["prompt_tokens"], len(prompt))
        self.assertEqual({e["object"] for e in events}, {"chat.completion.chunk"})

    def test_stop_string(self):
        prompt = self.text.encode("Hello")
        whole, _, _ = self.want(prompt, 40)
        letters = [c for c in whole if c.isascii()]
        self.assertNotEmpty(letters)
        for stop in (letters[-1], ["never", letters[-1]]):
            answer = self.post(prompt="Hello", temperature=0, max_tokens=40, stop=stop).json()
            (choice,) = answer["choices"]
            self.assertEqual(choice["text"], whole[: whole.index(letters[-1])])
            self.assertEqual(choice["finish_reason"], "stop")

    def test_models_and_health(self):
        models = self.client.get("/v1/models").json()
        self.assertEqual([m["id"] for m in models["data"]], ["toy"])
        health = self.client.get("/health").json()
        self.assertEqual((health["status"], health["pages"]), ("ok", 100))


class TemplateTest(ServerCase):
    template = TEMPLATE

    def test_chat_template(self):
        messages = [{"role": "user", "content": "Hi"}]
        prompt = self.text.encode("<user>Hi<a>")[1:]  # no <s> but the template's
        answer = self.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=9)
        self.assertEqual(answer.json()["usage"]["prompt_tokens"], len(prompt))
        content = answer.json()["choices"][0]["message"]["content"]
        self.assertEqual(content, self.want(prompt, 9)[0])

    def test_what_the_template_refuses(self):
        response = self.post("/v1/chat/completions", messages=[{"role": "user", "content": "bad"}])
        self.assertEqual(response.status_code, 400)
        self.assertRegex(response.json()["error"]["message"], "^messages: .*no bad words")


USER = {"role": "user", "content": "x"}


class RefusalsTest(ServerCase):
    @parameterized.parameters(
        (b"", "body: expected JSON"),
        (b"{", "body: expected JSON"),
        (b"[1]", "body: expected a JSON object, got \\[1\\]"),
        (b'"x"', "body: expected a JSON object"),
        (b"\xff\xfe{}", "body: expected JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "body: expected JSON: NaN is not JSON"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 4400 + b"}", "body: expected JSON"),
        (b"[" * 4900, "body: expected JSON"),
        (b"{}", "prompt: expected a string or a list of token ids, got None"),
    )
    def test_malformed_bodies(self, data, message):
        response = self.client.post("/v1/completions", content=data)
        self.assert_refused(response, message)

    @parameterized.parameters(
        ({"prompt": 3}, "prompt: expected a string or"),
        ({"prompt": ["a", "b"]}, "prompt: expected a string or"),
        ({"prompt": [1, True]}, "prompt: expected a string or"),
        ({"prompt": []}, "prompt: expected at least one token"),
        ({"prompt": [1, 258]}, "prompt: expected token ids below 258, got 258"),
        ({"prompt": [-1]}, "prompt: expected token ids below 258, got -1"),
        ({"prompt": [10**30]}, "prompt: expected token ids below 258"),
        ({"prompt": "x" * 399}, "prompt: expected at most 399 tokens.* 400 .*, got 400"),
        ({"prompt": "\ud800"}, "prompt: expected Unicode text"),
        ({"max_tokens": 0}, "max_tokens: expected an integer between 1"),
        ({"max_tokens": "5"}, "max_tokens: expected an integer"),
        ({"max_tokens": 1.5}, "max_tokens: expected an integer"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"temperature": -0.1}, "temperature: expected a number between 0 and 100"),
        ({"temperature": 1e400}, "body: expected JSON|temperature: expected a number"),
        ({"top_p": 0}, "top_p: expected more than 0"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"stop": 3}, "stop: expected a string or a list"),
        ({"stop": ["a", 3]}, "stop: expected strings"),
        ({"stop": [""]}, "stop: expected strings of 1 to 1000"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"stream": 1}, "stream: expected true or false"),
        ({"stream_options": 1}, "stream_options: expected an object"),
        ({"stream_options": {"include_usage": 0}}, "include_usage: expected true or false"),
        ({"n": 2}, "n: not supported, got 2"),
        ({"n": True}, "n: not supported, got True"),
        ({"echo": True}, "echo: not supported"),
        ({"logprobs": 5}, "logprobs: not supported, got 5"),
        ({"messages": []}, "'messages': there is no such field"),
        ({"tempreature": 1}, "'tempreature': there is no such field"),
        ({"\ud800": 1}, r"'\\ud800': there is no such field"),
    )
    def test_malformed_fields(self, fields, message):
        data = json.dumps({"prompt": "x", **fields}).encode()
        self.assert_refused(self.client.post("/v1/completions", content=data), message)

    @parameterized.parameters(
        (None, "messages: expected a list of some, got None"),
        ([], "messages: expected a list of some"),
        ("Hi", "messages: expected a list of some, got 'Hi'"),
        (["Hi"], r"messages\[0\]: expected an object, got 'Hi'"),
        ([USER, {"role": "god", "content": "x"}], r"messages\[1\].role: expected system, user,"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role: expected"),
        ([{"role": "user"}], r"messages\[0\].content: expected a string, got None"),
        ([{"role": "user", "content": [3]}], r"messages\[0\].content\[0\]: expected"),
        ([{"role": "user", "content": "\udfff"}], "messages: expected Unicode text"),
    )
    def test_malformed_messages(self, messages, message):
        data = json.dumps({"messages": messages}).encode()
        self.assert_refused(self.client.post("/v1/chat/completions", content=data), message)

    def test_deep_bodies(self):
        # Python's own limits for reading and for printing are near each other.
        for depth in (500, *range(900, 1000, 7), 2000):
            data = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
            response = self.client.post("/v1/completions", content=data)
            self.assertEqual(response.status_code, 400)
            self.assertRegex(response.json()["error"]["message"], "^(body|prompt): expected ")

    def assert_refused(self, response, message):
        self.assertEqual(response.status_code, 400, response.text)
        error = response.json()["error"]
        self.assertRegex(error["message"], f"^({message})")
        self.assertEqual(error["type"], "invalid_request_error")
        self.assertNotEmpty(error["param"])
        self.assert_serves()

    def test_fields_that_ask_for_nothing_are_taken(self):
        response = self.post(
            prompt="x", n=1, echo=False, logprobs=None, presence_penalty=0, user="me", suffix=None,
            temperature=None, max_tokens=None, stop=None, stream_options=None,
        )  # fmt: skip
        self.assertEqual(response.status_code, 200, response.text)
        self.assertEqual(response.json()["usage"]["completion_tokens"], 16)

    def test_another_model(self):
        response = self.post(prompt="x", model="gpt-5")
        self.assertEqual(response.status_code, 404)
        self.assertEqual(response.json()["error"]["message"], "model: expected toy, got 'gpt-5'")

    def test_other_paths_and_methods(self):
        for status, response in (
            (404, self.client.get("/v2")),
            (405, self.client.get("/v1/completions")),
            (405, self.client.post("/v1/models")),
        ):
            self.assertEqual(response.status_code, status)
            self.assertIn("/v", response.json()["error"]["message"])

    def test_large_bodies(self):
        def chunks():
            for _ in range(100):
                yield b" " * 100

        for content in (b" " * 5001, chunks()):
            with contextlib.suppress(httpx.WriteError):  # the server need not read on
                response = self.client.post("/v1/completions", content=content)
                self.assertEqual(response.status_code, 413)
                self.assertRegex(response.json()["error"]["message"], "at most 5000 bytes")
        self.assert_serves()

    def test_bodies_that_do_not_arrive(self):
        with socket.create_connection(self.address, timeout=20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            self.assertIn(b" 408 ", connection.recv(100))
        self.assert_serves()

    def test_too_many_requests(self):
        self.stepper.seconds = 0.02
        body = {"prompt": "x", "stream": True, "max_tokens": 300, "ignore_eos": True}
        with contextlib.ExitStack() as stack:
            for _ in range(LIMITS.concurrent_requests):
                answer = stack.enter_context(
                    self.client.stream("POST", "/v1/completions", json=body)
                )
                self.assertEqual(answer.status_code, 200)
            refused = self.post(prompt="x")
            self.assertEqual(refused.status_code, 429)
            self.assertEqual(refused.headers["retry-after"], "1")
            self.assertEqual(refused.json()["error"]["type"], "rate_limit_error")
            self.assertEqual(self.client.get("/health").status_code, 200)
        self.stepper.seconds = 0
        self.assert_idle()
        self.assert_serves()


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
        wait_until(lambda: self.engine.counts["pages_held"] == 0, seconds=2)
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
            wait_until(lambda: self.engine.counts["waiting"] == 0, seconds=2)
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
            return time.monotonic() - begin

        self.assertLess(asyncio.run(main()), LIMITS.send_seconds + 5)
        self.assert_serves()

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


class ProcessTest(parameterized.TestCase):
    @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
    def test_signals_end_the_process(self, number):
        script = (
            "from unittest import mock\n"
            "from examples.deepseek import load, server\n"
            "from examples.deepseek.tests import fake_stepper, toy_tokenizer\n"
            "made = fake_stepper.FakeStepper(vocab_size=258), toy_tokenizer.toy_tokenizer(), None\n"
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
