"""Batch mode and chat, with a fake model behind the loader."""

import argparse
import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from examples.deepseek import batch, chat, load, options, server
from examples.deepseek.request import Options
from examples.deepseek.runner import Runner
from examples.deepseek.sampling import Sampling
from examples.deepseek.tests.fake_stepper import FakeStepper, generate, make_engine
from examples.deepseek.tests.runner_test import wait_until
from examples.deepseek.tests.toy_tokenizer import EOS, VOCAB_SIZE, toy_tokenizer
from examples.deepseek.text import TextStream
from examples.deepseek.tokenization import Text
from jax_flashmla import native


class CommandLineCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.stepper = FakeStepper(
            page_size=8, num_pages=60, max_blocks=12, prefill_chunk=32, vocab_size=VOCAB_SIZE
        )
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.text = Text(toy_tokenizer())
        config = mock.Mock(max_position_embeddings=1000)
        self.loaded = mock.Mock(return_value=(self.stepper, toy_tokenizer(), config))
        self.enterContext(mock.patch.object(load, "load", self.loaded))
        self.stderr = self.enterContext(mock.patch("sys.stderr", io.StringIO()))

    def want(self, prompt, max_tokens=None, sampling=None):
        options = Options(max_tokens, sampling or Sampling())
        tokens, reason = generate(self.stepper.model, prompt, options, {EOS}, limit=96)
        return self.text.decode(tokens), reason, len(tokens)


class BatchTest(CommandLineCase):
    def answer(self, *lines, arguments=()):
        source, target = self.directory / "in.jsonl", self.directory / "out.jsonl"
        source.write_bytes(b"\n".join(lines))
        with self.assertRaises(SystemExit) as ended:
            batch.main(
                [str(source), str(target), "--model", "toy", "--max-new-tokens", "20", *arguments]
            )
        results = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
        return results, ended.exception.code

    def test_answers_in_order_with_the_lines_own_options(self):
        lines = [{"prompt": f"Text {i}", "max_tokens": 1 + i % 7, "id": f"é{i}"} for i in range(50)]
        results, code = self.answer(*[json.dumps(line).encode() for line in lines])
        self.assertEqual(code, 0)
        self.assertLen(results, 50)
        for i, result in enumerate(results):
            prompt = self.text.encode(f"Text {i}")
            text, reason, count = self.want(prompt, 1 + i % 7)
            usage = result.pop("usage")
            self.assertEqual(
                result, {"line": i + 1, "id": f"é{i}", "text": text, "finish_reason": reason}
            )
            self.assertEqual(
                (usage["prompt_tokens"], usage["completion_tokens"]), (len(prompt), count)
            )
        # Together, not one after the other.
        self.assertLess(self.stepper.decodes, sum(i % 7 for i in range(50)) / 2)

    def test_malformed_lines_harm_no_others(self):
        good = b'{"prompt": "Good"}'
        bad = {
            b"{": "body: expected JSON",
            b"\xff": "body: expected JSON",
            b"[]": "body: expected a JSON object",
            b'{"prompt": "x", "id": 1e999}': "body: expected JSON: a number above 1e308",
            b"{}": "prompt: expected a string or",
            b'{"prompt": "x", "temperature": "hot", "id": 7}': "temperature: expected a number",
            b'{"prompt": "x", "colour": 1}': "'colour': there is no such field",
            b'{"messages": [{"role": "x"}]}': "messages\\[0\\].role: expected",
            b'{"prompt": "%s"}' % (b"x" * 96): "prompt: expected at most 95 tokens",
        }
        lines = [line for data in bad for line in (data, good, b"", b"  ")]
        results, code = self.answer(*lines)
        self.assertEqual(code, 1)
        self.assertEqual([r["line"] for r in results], [i for i in range(1, 37) if i % 4 in (1, 2)])
        for result, message in zip(results[::2], bad.values(), strict=True):
            self.assertRegex(result["error"], "^" + message)
            self.assertNotIn("text", result)
        self.assertEqual(results[10]["id"], 7)
        for result in results[1::2]:
            self.assertEqual(result["text"], self.want(self.text.encode("Good"), 20)[0])
        self.assertRegex(self.stderr.getvalue(), "18 lines, 9 of them not answered")

    def test_a_failing_step_is_an_error_of_its_lines(self):
        prefill, exclamation = self.stepper.prefill, self.text.encode("!")[-1]

        def fail(tokens, start, block_table):
            if exclamation in tokens:
                raise RuntimeError("out of luck")
            return prefill(tokens, start, block_table)

        self.stepper.prefill = fail
        results, code = self.answer(b'{"prompt": "a!"}', b'{"prompt": "b"}')
        self.assertEqual(code, 1)
        self.assertEqual(results[0], {"line": 1, "error": "the request failed: out of luck"})
        self.assertEqual(results[1]["text"], self.want(self.text.encode("b"), 20)[0])

    def test_chat_lines_and_sampling_options(self):
        line = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
        arguments = ["--temperature", "0.9", "--seed", "3", "--top-p", "0.8"]
        (result,), code = self.answer(line, arguments=arguments)
        prompt = self.text.encode("User: Hi\n\nAssistant:")
        self.assertEqual(result["text"], self.want(prompt, 20, Sampling(0.9, 0.8, 3))[0])
        self.assertEqual(code, 0)

    def test_lines_that_nobody_waits_for_are_cancelled(self):
        decode = self.stepper.decode
        self.stepper.decode = lambda *operands: time.sleep(0.01) or decode(*operands)
        with Runner(make_engine(self.stepper, decode=self.text.decode)) as runner:
            lines = [json.dumps({"prompt": "x", "max_tokens": 1 + 80 * i}).encode() for i in (0, 1)]
            results = batch.answer_lines([*lines, *lines], runner, self.text, {})
            self.assertEqual(next(results)["line"], 1)
            results.close()
            wait_until(lambda: runner.engine.counts["running"] == 0)
            self.assertEqual(runner.engine.counts["pages_held"], 0)
            self.assertLess(self.stepper.decodes, 40)

    def test_ids_that_are_no_unicode(self):
        (result,), code = self.answer(b'{"prompt": "x", "id": "\\ud800"}')
        self.assertEqual((result["id"], code), ("\ud800", 0))

    def test_lines_from_a_pipe(self):
        source, target = self.directory / "pipe", self.directory / "out.jsonl"
        os.mkfifo(source)
        lines = b'{"prompt": "a"}\n{}\n'
        threading.Thread(target=source.write_bytes, args=(lines,), daemon=True).start()
        with self.assertRaises(SystemExit) as ended:
            batch.main([str(source), str(target), "--model", "toy", "--max-new-tokens", "5"])
        self.assertEqual(ended.exception.code, 1)
        first, second = map(json.loads, target.read_text("utf-8").splitlines())
        self.assertEqual(first["text"], self.want(self.text.encode("a"), 5)[0])
        self.assertIn("error", second)
        self.assertRegex(self.stderr.getvalue(), "2 lines, 1 of them not answered")

    def test_an_empty_file(self):
        self.assertEqual(self.answer(), ([], 0))

    def test_model_options_reach_the_loader(self):
        self.answer(
            b'{"prompt": "x"}',
            arguments=["--max-batch=6", "--max-tokens=130", "--data=2", "--model-axis=4",
                       "--dtype=float32", "--implementation=xla"],
        )  # fmt: skip
        self.loaded.assert_called_once_with(
            pathlib.Path("toy"), max_batch=6, num_pages=9, max_tokens=130, data=2, model_axis=4,
            implementation="xla", dtype="float32",
        )  # fmt: skip

    @mock.patch.object(native, "why_no_kernel", lambda operation: "broken")
    def test_errors_before_anything_is_read(self):
        source = self.directory / "in.jsonl"
        source.write_text("{}")
        for arguments, message in (
            ([source, source, "--model", "x"], "output: expected another file"),
            (["missing", "out", "--model", "x"], "missing"),
            ([source, "out"], "--model"),
            ([source, self.directory / "missing" / "out", "--model", "x"], "existing directory"),
            ([source, self.directory, "--model", "x"], "output: expected a file"),
            ([source, "out", "--model", "x", "--top-p", "2"], "top_p: expected a number"),
            ([source, "out", "--model", "x", "--max-batch", "0"], "expected at least 1, got 0"),
            (
                [source, "out", "--model", "x", "--implementation", "cuda"],
                "cuda cannot run: broken",
            ),
        ):
            with self.assertRaises(SystemExit) as ended:
                batch.main([str(argument) for argument in arguments])
            self.assertIn(ended.exception.code, (1, 2))
            self.assertRegex(self.stderr.getvalue().splitlines()[-1], message)
        self.loaded.assert_not_called()
        self.assertEqual(source.read_text(), "{}")

    def test_a_checkpoint_that_cannot_be_loaded(self):
        self.loaded.side_effect = FileNotFoundError("config.json: there is no such file")
        with self.assertRaises(SystemExit) as ended:
            chat.main(["--model", "nowhere"])
        self.assertEqual(ended.exception.code, 1)
        self.assertRegex(self.stderr.getvalue(), "config.json: there is no such file\n$")

    @parameterized.parameters(
        ("RESOURCE_EXHAUSTED: 9 B\nmore", "130 pages a pool: RESOURCE_EXHAUSTED: 9 B\nfewer"),
        ("CUDA_ERROR_OUT_OF_MEMORY: Out of memory", "Out of memory\nfewer pages: --max-batch"),
    )
    def test_a_model_for_which_there_is_no_memory(self, message, said):
        self.loaded.side_effect = jax.errors.JaxRuntimeError(message)
        with self.assertRaises(SystemExit) as ended:
            chat.main(["--model", "large", "--num-pages", "130"])
        self.assertEqual(ended.exception.code, 1)
        self.assertIn(said, self.stderr.getvalue())

    def test_other_errors_of_the_devices_are_not_hidden(self):
        self.loaded.side_effect = jax.errors.JaxRuntimeError("INTERNAL: broken")
        with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "INTERNAL: broken"):
            chat.main(["--model", "large"])

    def test_no_memory_for_the_first_steps(self):
        # The server compiles its programs before it says that it is ready.
        failing = mock.Mock(side_effect=jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 B"))
        with mock.patch.object(load, "warm_up", failing), self.assertRaises(SystemExit):
            server.main(["--model", "large"])
        self.assertIn("RESOURCE_EXHAUSTED: 1 B\nfewer pages", self.stderr.getvalue())


class OptionsTest(CommandLineCase):
    @parameterized.parameters("", "inner/..", ".")
    def test_a_model_has_its_directorys_name(self, path):
        self.enterContext(contextlib.chdir(self.directory))
        parser = argparse.ArgumentParser()
        options.add_model_options(parser)
        runner, _, name = options.load_engine(parser, parser.parse_args(["--model", path]))
        runner.close()
        self.assertEqual(name, self.directory.name)

    @parameterized.parameters("--max-requests", "--max-body")
    def test_limits_of_the_server(self, name):
        with mock.patch.object(server.uvicorn, "run"), self.assertRaises(SystemExit):
            server.main(["--model", "toy", name, "0"])
        self.assertRegex(self.stderr.getvalue(), f"{name}: expected at least 1, got 0")
        self.loaded.assert_not_called()


class ChatTest(CommandLineCase):
    def chat(self, *lines, arguments=()):
        with (
            mock.patch("sys.stdin", io.StringIO("".join(line + "\n" for line in lines))),
            mock.patch("sys.stdout", io.StringIO()) as stdout,
        ):
            chat.main(["--model", "toy", "--temperature", "0", "--max-new-tokens", "9", *arguments])
        return stdout.getvalue()

    def want_shown(self, prompt, max_tokens=9):
        return chat.printable(self.want(self.text.encode(prompt), max_tokens)[0])

    def test_a_conversation(self):
        shown = self.chat("Hi", "", "[bold]So?", arguments=["--system", "Be brief."])
        asked = "Be brief.\n\nUser: Hi\n\nAssistant:"
        first, _, _ = self.want(self.text.encode(asked), 9)
        self.assertIn(chat.printable(first), shown)
        asked += f" {first}\n\nUser: [bold]So?\n\nAssistant:"
        self.assertIn(self.want_shown(asked), shown)
        self.assertRegex(shown, r"\[9 tokens, .* 0 of \d+ prompt tokens were in the cache\]")
        cached = len(self.text.encode("Be brief.\n\nUser: Hi\n\nAssistant:")) // 8 * 8
        self.assertIn(f"{cached} of", shown)

    def test_a_new_conversation(self):
        shown = self.chat("Hi", "/new", "Hi")
        self.assertEqual(shown.count(self.want_shown("User: Hi\n\nAssistant:")), 2)

    def test_completion(self):
        shown = self.chat("Once", arguments=["--complete"])
        self.assertIn(self.want_shown("Once"), shown)

    def test_a_message_that_is_too_long(self):
        shown = self.chat("x" * 100, "Hi")
        self.assertIn("prompt: expected at most 95 tokens", shown)
        self.assertIn(self.want_shown("User: Hi\n\nAssistant:"), shown)

    def test_a_terminal_is_safe(self):
        self.assertEqual(chat.printable("a\x1b[31mé\x07\x9b漢\n\tb\r\u202e"), "a[31mé漢\n\tb")

    def test_an_interrupted_answer(self):
        asked = "User: Hi\n\nAssistant:"
        tokens, _ = generate(
            self.stepper.model, self.text.encode(asked), Options(30, Sampling()), {EOS}, limit=96
        )
        stream = TextStream(self.text.decode)
        said = "".join(stream.push(token) for token in tokens[:15])
        self.assertNotEmpty(said)
        decode, calls = self.stepper.decode, []

        def interrupted(*operands):
            calls.append(operands)
            if len(calls) == 15:  # 15 tokens are known, the first from the prompt
                wait_until(lambda: sys.stdout.getvalue() == chat.printable(said))
                time.sleep(0.1)  # for the main thread to wait for more
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.3)
            return decode(*operands)

        self.stepper.decode = interrupted
        # A shell's background jobs ignore it.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        shown = self.chat("Hi", "So?", arguments=["--max-new-tokens=30"])
        self.assertStartsWith(shown, chat.printable(said) + " (interrupted)\n[")
        asked += f" {said}\n\nUser: So?\n\nAssistant:"
        self.assertIn(self.want_shown(asked, 30), shown)


if __name__ == "__main__":
    absltest.main()
