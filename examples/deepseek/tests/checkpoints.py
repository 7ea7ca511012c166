"""Small random checkpoints in the published layout."""

import functools
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

from examples.deepseek.config import parse_config
from examples.deepseek.layout import published_shapes
from examples.deepseek.presets import V2_LITE
from examples.deepseek.tiny_tokenizer import save_tokenizer, train_tokenizer

YARN = V2_LITE["rope_scaling"] | {"original_max_position_embeddings": 32}
# Shaped like the published ones, which share the widths of a cache row.
COMMON = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "max_position_embeddings": 1280,
    "tie_word_embeddings": False,
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V2 = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
FIELDS = {
    "v2_lite": COMMON
    | V2
    | {
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "v2": COMMON
    | V2
    | {
        "q_lora_rank": 40,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "n_group": 8,
        "topk_group": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    },
    "v3": COMMON
    | V3
    | {
        "q_lora_rank": 40,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "num_nextn_predict_layers": 1,
    },
}


make_tokenizer = functools.cache(train_tokenizer)


def random_tensors(fields, rng) -> dict[str, np.ndarray]:
    """Every tensor of the layout, float32; outputs near unit variance, softmaxes not uniform."""
    config = parse_config(fields)
    tensors = {}
    for name, shape in published_shapes(config).items():
        draw = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * draw
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = 0.1 * draw
        elif name == "model.embed_tokens.weight":
            tensors[name] = draw
        else:
            wide = 3 if "q_proj" in name or "q_b_proj" in name or "mlp.gate." in name else 1
            tensors[name] = draw * wide * shape[-1] ** -0.5
    return tensors


def write(directory, fields, tensors, shards=3) -> pathlib.Path:
    """Writes `config.json`, a tokenizer, and the tensors: in one file or several with an index."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=1))
    save_tokenizer(make_tokenizer(fields["vocab_size"]), directory)
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[number::shards]}
        safetensors.numpy.save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return directory


def write_random(directory, kind, rng, shards=3, **changes) -> pathlib.Path:
    """A random checkpoint of one of `FIELDS`, some of them changed."""
    fields = FIELDS[kind] | changes
    return write(directory, fields, random_tensors(fields, rng), shards)


def quantize(tensor, block=(128, 128)):
    """A matrix in FP8 and its blocks' scales: what is multiplied by to get it back."""
    rows, columns = tensor.shape
    shape = [-(-size // step) for size, step in zip(tensor.shape, block, strict=True)]
    scale = np.empty(shape, np.float32)
    stored = np.empty(tensor.shape, ml_dtypes.float8_e4m3fn)
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    for i in range(shape[0]):
        for j in range(shape[1]):
            part = np.s_[
                i * block[0] : min((i + 1) * block[0], rows),
                j * block[1] : min((j + 1) * block[1], columns),
            ]
            scale[i, j] = np.abs(tensor[part]).max() / largest
            stored[part] = (tensor[part] / scale[i, j]).astype(stored.dtype)
    return stored, scale
