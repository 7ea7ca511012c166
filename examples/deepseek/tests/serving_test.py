"""The engine over the real steps, and the commands over a random checkpoint."""

import io
import json
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from tokenizers import processors

from examples.deepseek import batch, chat, load, steps, weights
from examples.deepseek.engine import Engine
from examples.deepseek.request import Options
from examples.deepseek.sampling import Sampling, sample
from examples.deepseek.tests import support
from examples.deepseek.tests.toy_tokenizer import BOS, EOS, byte_backend, toy_tokenizer
from examples.deepseek.tokenization import Text


def generate(stepper, prompt, options):
    """One request alone: prefilled, then decoded in row 0 with the first pages."""
    table = np.arange(stepper.max_blocks, dtype=np.int32)
    tables = np.zeros((stepper.max_batch, stepper.max_blocks), np.int32)
    tables[0] = table
    tokens, lengths = np.zeros((2, stepper.max_batch), np.int32)
    generator, found = options.sampling.generator(), list(prompt)
    for start in range(0, len(prompt), stepper.prefill_chunk):
        logits = stepper.prefill(prompt[start : start + stepper.prefill_chunk], start, table)
    while True:
        found.append(sample(logits, options.sampling, generator))
        if len(found) - len(prompt) == options.max_tokens:
            return found[len(prompt) :]
        tokens[0], lengths[0] = found[-1], len(found)
        logits = stepper.decode(tokens, tables, lengths)[0]


class EngineOnTheModelTest(support.CheckpointTest):
    @parameterized.parameters(("v2_lite", None), ("v3", (2, 2)))
    def test_tokens_are_those_of_each_request_alone(self, kind, mesh_shape):
        """In float32, where the order of a sum's terms does not change a token."""
        directory = self.checkpoint(kind)
        mesh = mesh_shape and steps.make_mesh(*mesh_shape)
        options = {"attention": "plain", "dtype": "float32", "max_blocks": 3, "prefill_chunk": 32}
        stepper = steps.load_stepper(directory, max_batch=4, num_pages=5, mesh=mesh, **options)
        alone = steps.load_stepper(directory, max_batch=1, num_pages=3, **options)
        engine = Engine(stepper)
        prefix = self.rng.integers(0, 512, 70).tolist()
        requests, answers = [], []
        for i in range(9):
            own = self.rng.integers(0, 512, 45 + 2 * i).tolist()
            prompt = prefix + own[:20] if i < 4 else own
            sampling = Sampling() if i % 2 else Sampling(0.8, 0.9, seed=i)
            requests.append((prompt, Options(30 - i, sampling)))
            answers.append([])
        handles = [
            engine.submit(*request, answer.append)
            for request, answer in zip(requests, answers, strict=True)
        ]
        while engine.step():
            pass
        self.assertEqual(engine.counts["pages_held"], 0)
        if mesh is None:  # two pools have pages enough
            self.assertGreater(engine.evictions, 0)
        self.assertGreaterEqual(sum(handle.cached_tokens == 64 for handle in handles), 2)
        for request, answer in zip(requests, answers, strict=True):
            self.assertIsNone(answer[-1].error)
            got = [token for event in answer for token in event.tokens]
            self.assertEqual(got, generate(alone, *request))


class WarmUpTest(support.CheckpointTest):
    def test_no_request_compiles_anything_after_it(self):
        stepper = steps.load_stepper(
            self.checkpoint("v2_lite"), max_batch=2, num_pages=4, max_blocks=3, prefill_chunk=48
        )
        with jax.log_compiles(), self.assertLogs("jax", "WARNING") as logs:
            load.warm_up(stepper)
        self.assertRegex("".join(logs.output), "Compiling jit.* decode")
        with jax.log_compiles(), self.assertNoLogs("jax", "WARNING"):
            for length in (1, 16, 17, 48, 100):
                engine, told = Engine(stepper), []
                engine.submit([1] * length, Options(3), told.append)
                while engine.step():
                    pass
                self.assertEqual((told[-1].finish_reason, told[-1].error), ("length", None))


class ServingCheckpointTest(support.CheckpointTest):
    def serving_checkpoint(self, **changes):
        directory = self.checkpoint("v2_lite", **changes)
        toy_tokenizer().save_pretrained(directory)
        return directory


class LoadTest(ServingCheckpointTest):
    def load(self, directory, **changes):
        arguments = {"max_batch": 2, "num_pages": 5, "max_tokens": 130} | changes
        return load.load(directory, **arguments)

    def test_what_is_loaded(self):
        directory = self.serving_checkpoint()
        stepper, tokenizer, config = self.load(directory, dtype="float32", data=2, model_axis=4)
        self.assertEqual((stepper.max_batch, stepper.num_pages, stepper.max_blocks), (2, 5, 3))
        self.assertEqual((stepper.pools, stepper.mesh.shape["model"]), (2, 4))
        self.assertEqual(config.max_position_embeddings, 1280)
        self.assertEqual({str(x.dtype) for x in stepper.params.values()}, {"float32"})
        text, toy = Text(tokenizer), Text(toy_tokenizer())
        self.assertEqual(text.encode("é</s>"), toy.encode("é</s>"))
        self.assertEqual(text.eos, {EOS})

    def test_end_tokens_of_all_files(self):
        directory = self.serving_checkpoint()
        self.assertEqual(load.end_tokens(directory), {1})
        (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
        self.assertEqual(load.end_tokens(directory), {1, 5, 7})
        self.assertEqual(Text(toy_tokenizer(), load.end_tokens(directory)).eos, {1, 5, 7, EOS})
        for text, message in (("{", "expected JSON, got"), ("[]", "a JSON object, got a list")):
            (directory / "generation_config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, f"generation_config.json: .*{message}"):
                load.end_tokens(directory)

    @parameterized.product(
        adds_bos=(True, False, None),
        in_file=(True, False),
        named=("LlamaTokenizerFast", "PreTrainedTokenizerFast"),
    )
    def test_the_first_token_comes_once(self, adds_bos, in_file, named):
        """As in the published files, whose configuration names a class that is of no use here."""
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        backend = byte_backend()
        if not in_file:
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.save(str(directory / "tokenizer.json"))
        token = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": True}
        fields = {
            "add_bos_token": adds_bos,
            "bos_token": token | {"content": "<s>"},
            "eos_token": token | {"content": "</s>"},
            "tokenizer_class": named,
            "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(json.dumps(fields))
        text = Text(load.load_tokenizer(directory))
        plain = text.encode_chat([{"role": "user", "content": "hé  \n!"}])
        self.assertEqual(plain[0], BOS)
        self.assertEqual(plain.count(BOS), 1)
        self.assertEqual(text.decode(plain), "hé  \n!")
        wanted = plain if adds_bos or in_file else plain[1:]
        self.assertEqual(text.encode("hé  \n!"), wanted)

    def test_no_tokenizer(self):
        directory = self.checkpoint("v2_lite")
        (directory / "tokenizer.json").unlink()
        with self.assertRaisesRegex(FileNotFoundError, "tokenizer.json: expected a tokenizer"):
            self.load(directory)

    def test_a_malformed_tokenizer(self):
        directory = self.serving_checkpoint()
        (directory / "tokenizer.json").write_text("{")
        with self.assertRaisesRegex(ValueError, "tokenizer.json: "):
            self.load(directory)

    @mock.patch.object(weights, "load", side_effect=AssertionError("weights were read"))
    def test_errors_before_the_weights_are_read(self, _):
        with self.assertRaisesRegex(ValueError, "at most config.json's 256 tokens, got 258"):
            self.load(self.serving_checkpoint(vocab_size=256))
        with self.assertRaisesRegex(ValueError, "max_batch: expected a multiple of 3 pools, got 2"):
            self.load(self.serving_checkpoint(), data=3)

    def test_a_mesh_that_does_not_fit(self):
        directory = self.serving_checkpoint()
        with self.assertRaisesRegex(ValueError, "mesh: "):
            self.load(directory, data=5, model_axis=2)


class CommandsTest(ServingCheckpointTest):
    def test_batch_mode(self):
        directory = self.serving_checkpoint()
        arguments = {"max_batch": 4, "num_pages": 12, "max_tokens": 192, "dtype": "float32"}
        stepper, tokenizer, _ = load.load(directory, **arguments)
        text = Text(tokenizer, [1])
        options = Options(30, Sampling(0.7, 1.0, 5), ignore_eos=True)
        want = text.decode(generate(stepper, text.encode("Pages are"), options))

        source, target = directory / "in.jsonl", directory / "out.jsonl"
        lines = [{"prompt": "Pages are", "ignore_eos": True}, {"prompt": ""}, {"prompt": [600]}]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [
            source, target, "--model", directory, "--max-batch=4", "--num-pages=12",
            "--max-tokens=192", "--dtype=float32", "--temperature=0.7", "--seed=5",
            "--max-new-tokens=30",
        ]  # fmt: skip
        with self.assertRaises(SystemExit) as ended, mock.patch("sys.stderr", io.StringIO()):
            batch.main([str(argument) for argument in command])
        self.assertEqual(ended.exception.code, 1)
        first, second, third = map(json.loads, target.read_text().splitlines())
        self.assertEqual((first["text"], first["finish_reason"]), (want, "length"))
        self.assertEqual(second["usage"]["prompt_tokens"], 1)  # <s>
        self.assertRegex(third["error"], "expected token ids below 512, got 600")

    def test_chat_on_a_mesh(self):
        directory = self.serving_checkpoint()
        command = [
            "--model", str(directory), "--data=2", "--model-axis=2", "--max-batch=2",
            "--max-tokens=192", "--max-new-tokens=12", "--complete",
        ]  # fmt: skip
        with (
            mock.patch("sys.stdin", io.StringIO("Once\n")),
            mock.patch("sys.stdout", io.StringIO()) as stdout,
        ):
            chat.main(command)
        self.assertRegex(stdout.getvalue(), r"\[\d+ tokens, .* 0 of 5 prompt tokens")

    def test_a_checkpoint_that_cannot_be_loaded(self):
        directory = self.serving_checkpoint()
        for path in pathlib.Path(directory).glob("model-00002*"):
            path.unlink()
        stderr = self.enterContext(mock.patch("sys.stderr", io.StringIO()))
        with self.assertRaises(SystemExit) as ended:
            chat.main(["--model", str(directory)])
        self.assertEqual(ended.exception.code, 1)
        self.assertRegex(stderr.getvalue(), "model-00002-of-00003.safetensors")
        shutil.rmtree(directory)
        with self.assertRaises(SystemExit):
            chat.main(["--model", str(directory)])
        directory.mkdir()  # for the clean-up


if __name__ == "__main__":
    absltest.main()
