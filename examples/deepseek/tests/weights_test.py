"""Loading: the published layout, FP8, meshes, and what is wrong with a checkpoint."""

import itertools
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from examples.deepseek import weights
from examples.deepseek.config import parse_config, read_config
from examples.deepseek.layout import sources
from examples.deepseek.model import abstract_model
from examples.deepseek.steps import make_mesh
from examples.deepseek.tests import checkpoints, support

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
K_UP = "layers/1/attention/k_up"


class LoadTest(support.CheckpointTest):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, kind, tensors=None, shards=3, **changes):
        fields = checkpoints.FIELDS[kind] | {"num_hidden_layers": 3} | changes
        if tensors is None:
            tensors = checkpoints.random_tensors(fields, self.rng)
        checkpoints.write(self.directory, fields, tensors, shards)
        return fields, tensors

    def load(self, dtype=jnp.float32, mesh=None):
        mesh = mesh or make_mesh()
        return weights.load(self.directory, read_config(self.directory), mesh, dtype)

    @parameterized.product(kind=tuple(checkpoints.FIELDS), shards=(1, 3))
    def test_every_tensor_arrives(self, kind, shards):
        fields, tensors = self.write(kind, shards=shards)
        params = self.load()
        config = parse_config(fields)
        shapes = abstract_model(config, jnp.dtype("float32"))[2]
        self.assertEqual(
            {k: v.shape for k, v in params.items()}, {k: v.shape for k, v in shapes.items()}
        )
        # What is loaded adds up to what was written: by size and, nearly, by value.
        self.assertEqual(
            sum(x.size for x in params.values()), sum(x.size for x in tensors.values())
        )
        total = sum(float(np.abs(x).sum(dtype=np.float64)) for x in tensors.values())
        found = sum(float(np.abs(np.asarray(x)).sum(dtype=np.float64)) for x in params.values())
        self.assertAlmostEqual(found / total, 1, delta=1e-9)

    def test_names_and_orientation(self):
        _, tensors = self.write("v3")
        params = self.load()
        layer = "model.layers.1."
        both = tensors[layer + "self_attn.kv_b_proj.weight"].reshape(8, 32 + 24, 512)
        np.testing.assert_array_equal(params[K_UP], both[:, :32])
        np.testing.assert_array_equal(params["layers/1/attention/v_up"], both[:, 32:])
        for e in (0, 7, 15):
            down = tensors[f"{layer}mlp.experts.{e}.down_proj.weight"]
            np.testing.assert_array_equal(params["layers/1/mlp/down"][e], down.T)
        bias = tensors[layer + "mlp.gate.e_score_correction_bias"]
        np.testing.assert_array_equal(params["layers/1/mlp/bias"], bias)

    def test_bfloat16(self):
        _, tensors = self.write("v3")
        stored = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
        self.write("v3", stored)
        params = self.load(jnp.bfloat16)
        routers = {name for name, x in params.items() if x.dtype == jnp.float32}
        self.assertEqual(
            routers, {f"layers/{i}/mlp/{x}" for i in (1, 2) for x in ("router/kernel", "bias")}
        )
        want = stored["lm_head.weight"].T
        np.testing.assert_array_equal(params["head/kernel"].view(jnp.uint16), want.view(np.uint16))

    @parameterized.parameters((1, 8), (2, 4), (8, 1))
    def test_each_device_has_its_part(self, data, model):
        fields, _ = self.write("v3")
        whole = self.load()
        mesh = make_mesh(data, model)
        params = self.load(mesh=mesh)
        for name, source in sources(parse_config(fields)).items():
            self.assertEqual(params[name].sharding, jax.NamedSharding(mesh, source.spec))
            np.testing.assert_array_equal(params[name], whole[name])
            divided = any(source.spec) and model > 1
            part = params[name].addressable_shards[0].data
            self.assertEqual(part.size * (model if divided else 1), params[name].size)

    def test_little_is_on_the_host_at_a_time(self):
        self.write("v3")
        events = []

        def note(event, function):
            def noted(*args):
                events.append(event)
                return function(*args)

            return noted

        with (
            mock.patch.object(weights.Files, "read", note("read", weights.Files.read)),
            mock.patch.object(jax, "device_put", note("put", jax.device_put)),
        ):
            self.load(mesh=make_mesh(1, 8))
        # One tensor, or the 2 of 16 experts that one of 8 devices has, between copies to devices.
        reads = [len(list(group)) for event, group in itertools.groupby(events) if event == "read"]
        self.assertEqual(set(reads), {1, 2})
        self.assertEqual(reads.count(2), 8 * 3 * 2)  # devices, matrices, layers

    def test_fp8_is_dequantized(self):
        fields, tensors = self.write("v3", quantization_config=FP8, hidden_size=200)
        stored, want = {}, dict(tensors)
        for name, tensor in tensors.items():
            small = tensor.ndim < 2 or "embed" in name or "lm_head" in name or "mlp.gate." in name
            if small:
                stored[name] = tensor
                continue
            stored[name], stored[name + "_scale_inv"] = checkpoints.quantize(tensor)
            scale = np.kron(stored[name + "_scale_inv"], np.ones((128, 128), np.float32))
            scale = scale[: tensor.shape[0], : tensor.shape[1]]
            want[name] = stored[name].astype(np.float32) * scale
            # The round trip loses no more than half a step of 3 bits, or a 512th at the bottom.
            np.testing.assert_allclose(want[name], tensor, rtol=2**-4, atol=scale.max() / 512)
        self.write("v3", stored, quantization_config=FP8, hidden_size=200)
        params = self.load()
        self.assertTrue(any(x.dtype == ml_dtypes.float8_e4m3fn for x in stored.values()))
        for name, source in sources(parse_config(fields)).items():
            expected = source.assemble([want[x] for x in source.names])
            np.testing.assert_array_equal(params[name], expected, err_msg=name)

    def test_the_layer_that_predicts_ahead_is_ignored(self):
        fields, tensors = self.write("v3")
        extra = {"model.layers.3.eh_proj.weight": np.ones((96, 192), np.float32)}
        self.write("v3", tensors | extra)
        self.assertEqual(self.load().keys(), sources(parse_config(fields)).keys())

    def refuse(self, tensors, *messages, **changes):
        self.write("v3", tensors, **changes)
        with self.assertRaises(ValueError) as caught:
            self.load()
        for message in messages:
            self.assertIn(message, str(caught.exception))

    def test_missing_and_misshapen_tensors_are_named_together(self):
        _, tensors = self.write("v3")
        experts, o = (
            "model.layers.2.mlp.experts.3.up_proj.weight",
            "model.layers.0.self_attn.o_proj.weight",
        )
        del tensors[experts]
        tensors[o] = tensors[o][:, :-1]
        self.refuse(
            tensors,
            f"{experts}: expected shape [48, 96], and it is missing",
            f"{o}: expected shape [96, 192], got [96, 191]",
        )

    def test_other_tensors_are_refused(self):
        _, tensors = self.write("v3")
        name = "model.layers.0.self_attn.o_proj"
        self.refuse(
            tensors | {name + ".bias": np.ones(96, np.float32)},
            f"{name}.bias: expected no such tensor, got shape [96]",
        )
        whole = {name + ".weight": np.ones((96, 192), np.int8)}
        self.refuse(tensors | whole, f"{name}.weight: expected one of BF16", "got I8")

    def test_fp8_that_cannot_be_dequantized(self):
        _, tensors = self.write("v3")
        name = "model.layers.0.self_attn.o_proj.weight"
        stored, scale = checkpoints.quantize(tensors[name])
        self.refuse(tensors | {name: stored}, f"{name}: expected 16 or 32 bits without a quant")
        fp8 = {"quantization_config": FP8}
        scales = name + "_scale_inv"
        self.refuse(tensors | {name: stored}, f"{scales}: expected shape [1, 2], and", **fp8)
        wrong = tensors | {name: stored, scales: scale.T.copy()}
        self.refuse(wrong, f"{scales}: expected shape [1, 2], got [2, 1]", **fp8)

    def test_a_long_list_is_cut(self):
        _, tensors = self.write("v3")
        few = {"lm_head.weight": tensors["lm_head.weight"]}
        self.refuse(few, f"and {len(tensors) - 1 - weights.MOST_PROBLEMS} more")


class FilesTest(absltest.TestCase):
    def test_broken_files(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        config = parse_config(checkpoints.FIELDS["v3"])

        def check(error, message):
            with self.assertRaisesRegex(error, message):
                weights.load(directory, config, make_mesh(), jnp.float32)

        check(FileNotFoundError, "expected model.safetensors.index.json or model.safetensors")
        single, index = directory / weights.SINGLE, directory / weights.INDEX
        single.write_bytes(b"no tensors")
        check(ValueError, "model.safetensors: expected a safetensors file, got")
        safetensors.numpy.save_file({"lm_head.weight": np.ones((512, 96), np.float32)}, single)
        single.write_bytes(single.read_bytes()[:-4])  # a download that broke off
        check(ValueError, "model.safetensors: expected a safetensors file, got")
        for text in ("{", "[]", '{"weight_map": 3}', "{}"):
            index.write_text(text)
            check(ValueError, "index.json: expected JSON with a weight_map, got")
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "other.safetensors"}}))
        check(FileNotFoundError, "other.safetensors: .*names this file, and it is missing")


if __name__ == "__main__":
    absltest.main()
