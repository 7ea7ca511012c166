"""The HTTP endpoint's answers, through a real server."""

import numpy as np
from absl.testing import absltest

from examples.deepseek.protocol import parse_query
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.server_cases import ServerCase
from examples.deepseek.tests.toy_tokenizer import toy_tokenizer
from examples.deepseek.tokenization import Text

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


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
            # The stop string itself has no text, but the stream's end must be told.
            chunks = self.events(prompt="Hello", temperature=0, max_tokens=40, stop=stop)
            self.assertEqual("".join(c["choices"][0]["text"] for c in chunks), choice["text"])
            self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "stop")

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


class QueryTest(absltest.TestCase):
    def parse(self, template, **body):
        text = Text(toy_tokenizer(template))
        return parse_query(body, text, chat="messages" in body, defaults={"max_tokens": 9})

    def test_an_answer_without_a_template_ends_before_the_next_turn(self):
        messages = [{"role": "user", "content": "Hi"}]
        self.assertEqual(self.parse(None, messages=messages).options.stop, ("\n\nUser:",))
        query = self.parse(None, messages=messages, stop="x")
        self.assertEqual(query.options.stop, ("x", "\n\nUser:"))
        self.assertEqual(self.parse(TEMPLATE, messages=messages).options.stop, ())
        self.assertEqual(self.parse(None, prompt="Hi").options.stop, ())

    def test_as_many_stop_strings_as_are_said(self):
        messages = [{"role": "user", "content": "Hi"}]
        for template, most in ((None, 15), (TEMPLATE, 16)):
            options = self.parse(template, messages=messages, stop=["x"] * most).options
            self.assertLen(options.stop, 16)
            with self.assertRaisesRegex(ValueError, f"at most {most} strings, got {most + 1}"):
                self.parse(template, messages=messages, stop=["x"] * (most + 1))

    def test_an_answer_comes_back_as_it_was(self):
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": " Hello."},  # as the model went on
            {"role": "user", "content": "So?"},
        ]
        want = "User: Hi\n\nAssistant: Hello.\n\nUser: So?\n\nAssistant:"
        prompt = self.parse(None, messages=messages).prompt
        self.assertEqual(prompt, Text(toy_tokenizer()).encode(want))

    def test_defaults(self):
        self.assertEqual(self.parse(None, prompt="Hi", max_tokens=None).options.max_tokens, 9)
        self.assertEqual(self.parse(None, prompt="Hi", max_tokens=3).options.max_tokens, 3)
        messages = [{"role": "user", "content": "Hi"}]
        query = self.parse(None, messages=messages, max_completion_tokens=4, max_tokens=3)
        self.assertEqual(query.options.max_tokens, 4)
        self.assertEqual(query.options.sampling, Sampling(1.0, 1.0, None))


if __name__ == "__main__":
    absltest.main()
