"""Configurations that are read, and those that are refused."""

import json
import math
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from examples.deepseek import config as configs
from examples.deepseek.layout import check_divides, published_shapes
from examples.deepseek.tests import checkpoints

# Dimensions of the published files, and how many parameters the models are said to have.
PUBLISHED = {
    "v2_lite": (
        "v2_lite",
        15.7e9,
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "vocab_size": 102400,
        },
    ),
    "v2": (
        "v2",
        236e9,
        {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "vocab_size": 102400,
        },
    ),
    "v3": (
        "v3",
        671e9,
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "vocab_size": 129280,
        },
    ),
}
HEAD_DIMS = {"qk_nope_head_dim": 128, "v_head_dim": 128}


class ConfigTest(parameterized.TestCase):
    @parameterized.named_parameters((name, *case) for name, case in PUBLISHED.items())
    def test_published_dimensions_have_the_published_size(self, kind, parameters, fields):
        config = configs.parse_config(checkpoints.FIELDS[kind] | HEAD_DIMS | fields)
        found = sum(math.prod(shape) for shape in published_shapes(config).values())
        self.assertAlmostEqual(found / parameters, 1, delta=0.002)

    @parameterized.named_parameters(
        ("architecture", {"architectures": ["LlamaForCausalLM"]}, "architectures: .*got Llama"),
        ("no_architecture", {"architectures": None}, "architectures: .*got none"),
        ("latent", {"kv_lora_rank": 256}, "kv_lora_rank: expected 512.*got 256"),
        ("rope", {"qk_rope_head_dim": 32}, "qk_rope_head_dim: expected 64.*got 32"),
        ("bias", {"attention_bias": True}, "attention_bias: expected False, got True"),
        ("act", {"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ("tied", {"tie_word_embeddings": True}, "tie_word_embeddings: expected false"),
        ("text", {"hidden_size": "wide"}, "hidden_size: expected an integer from 1, got 'wide'"),
        ("zero", {"num_hidden_layers": 0}, "num_hidden_layers: expected an integer from 1, got 0"),
        ("null", {"v_head_dim": None}, "v_head_dim: expected an integer from 1, got None"),
        ("eps", {"rms_norm_eps": -1.0}, "rms_norm_eps: expected a number above 0, got -1.0"),
        ("method", {"topk_method": "best"}, "topk_method: expected one of greedy.*got best"),
        ("scoring", {"scoring_func": "sigmoid"}, "scoring_func: expected softmax.*got sigmoid"),
        ("groups", {"n_group": 3}, "n_group: expected a divisor of 16 experts, got 3"),
        ("few", {"topk_group": 9, "n_group": 8}, "topk_group: expected at most n_group, 8, got 9"),
        ("many", {"num_experts_per_tok": 17}, "num_experts_per_tok: expected at most 16"),
        ("inner", {"moe_intermediate_size": None}, "moe_intermediate_size: expected a number"),
        ("rope_type", {"rope_scaling": {"type": "linear"}}, "rope_scaling.type: expected yarn"),
        ("rope_list", {"rope_scaling": [40]}, r"rope_scaling: expected an object, got \[40\]"),
        ("rope_halves", {"rope_interleave": False}, "rope_interleave: expected True, got False"),
        (
            "rope_field",
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            "rope_scaling.original_max_position_embeddings: expected a number, got None",
        ),
        ("rope_factor", {"rope_scaling": checkpoints.YARN | {"factor": 0.5}}, "factor: expected"),
        (
            "rope_zero",
            {"rope_scaling": checkpoints.YARN | {"beta_fast": 0}},
            "beta_fast: expected a number above 0, got 0",
        ),
        ("rope_theta", {"rope_theta": 1}, "rope_theta: expected a number above 1, got 1"),
        (
            "block",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, "x"]}},
            r"quantization_config: .*got fp8 and \[0, 'x'\]",
        ),
        (
            "quantized",
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config: .*awq",
        ),
    )
    def test_refused(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            configs.parse_config(checkpoints.FIELDS["v2_lite"] | changes)

    @parameterized.product(kind=tuple(checkpoints.FIELDS), yarn=(True, False))
    def test_as_transformers_saves_it(self, kind, yarn):
        fields = checkpoints.FIELDS[kind] | {"rope_theta": 50000.0}
        rope = {"rope_theta": 50000.0, "rope_type": "default"}
        if yarn:
            rope = checkpoints.YARN | fields["rope_scaling"] | rope | {"rope_type": "yarn"}
        else:
            fields["rope_scaling"] = None
        want = configs.parse_config(fields)
        saved = fields | {"rope_parameters": rope}
        absent = ["rope_theta", "rope_scaling", "scoring_func"]
        for name in absent + ["topk_method"] * (kind == "v3"):
            del saved[name]
        if kind == "v2_lite":
            saved |= {"n_group": None, "topk_group": None}
        self.assertEqual(configs.parse_config(saved), want)
        self.assertEqual(want.rope_scaling is not None, yarn)

    @parameterized.parameters("vocab_size", "rms_norm_eps", "kv_lora_rank")
    def test_missing_field(self, name):
        fields = {k: v for k, v in checkpoints.FIELDS["v2_lite"].items() if k != name}
        with self.assertRaisesRegex(ValueError, f"{name}: expected it in config.json"):
            configs.parse_config(fields)

    def test_files(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        with self.assertRaisesRegex(FileNotFoundError, "config.json: expected"):
            configs.read_config(directory)
        for text, message in (("{", "expected JSON, got"), ("[]", "a JSON object, got a list")):
            (directory / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, message):
                configs.read_config(directory)
        (directory / "config.json").write_text(json.dumps(checkpoints.FIELDS["v3"]))
        self.assertEqual(configs.read_config(directory).scoring_func, "sigmoid")

    def test_a_mesh_that_does_not_divide(self):
        config = configs.parse_config(checkpoints.FIELDS["v2_lite"])
        with self.assertRaisesRegex(ValueError, "divides num_attention_heads, 8, got 3 devices"):
            check_divides(config, 3)


if __name__ == "__main__":
    absltest.main()
