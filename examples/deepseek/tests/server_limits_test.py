"""What the HTTP endpoint refuses: malformed requests, and those beyond its limits."""

import contextlib
import json
import socket

import httpx
from absl.testing import absltest, parameterized

from examples.deepseek.tests.server_cases import LIMITS, ServerCase

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
        ({"stop": [""]}, "stop: expected strings of 1 to 256"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"stream": 1}, "stream: expected true or false"),
        ({"stream_options": 1}, "stream_options: expected an object"),
        ({"stream_options": {"include_usage": 0}}, "include_usage: expected true or false"),
        ({"stream_options": {"every": 2}}, r"stream_options\['every'\]: not supported, got 2"),
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
        ([USER | {"name": "Bob"}], r"messages\[0\]\['name'\]: not supported, got 'Bob'"),
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
            ignore_eos=True,  # sampled at random, it would come early now and then
        )  # fmt: skip
        self.assertEqual(response.status_code, 200, response.text)
        self.assertEqual(response.json()["usage"]["completion_tokens"], 16)
        message = {"role": "user", "content": "x", "name": None, "tool_calls": []}
        body = {"messages": [message], "stream_options": {"every": 0}}
        response = self.client.post("/v1/chat/completions", json=body)
        self.assertEqual(response.status_code, 200, response.text)

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

    def test_a_large_body_is_refused_before_it_is_sent(self):
        with socket.create_connection(self.address, timeout=20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5001\r\n\r\n"
            )
            self.assertIn(b" 413 ", connection.recv(100))
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


if __name__ == "__main__":
    absltest.main()
