"""Where each parameter comes from in the published layout, and how a mesh divides it.

The names are those of the safetensors files that DeepSeek publishes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P

from examples.deepseek.config import LATENT_DIM, ROPE_DIM, Config


class Source(NamedTuple):
    """What a parameter is made of.

    One published tensor, or for `stacked` parameters one for each expert, in order.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each published tensor
    convert: Callable  # a published tensor, NumPy's or JAX's, to the parameter or its slice
    spec: P  # of the parameter
    stacked: bool = False

    def assemble(self, tensors, numpy=np):
        """The parameter, or a slice of a stack, from published tensors of NumPy or `jax.numpy`."""
        parts = [self.convert(tensor) for tensor in tensors]
        return numpy.stack(parts) if self.stacked else parts[0]


def sources(config: Config) -> dict[str, Source]:
    """The source of every parameter of `model.Model`, by the parameter's name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    found = {
        "embed/embedding": _plain("model.embed_tokens", (vocab, hidden)),
        "norm/scale": _plain("model.norm", (hidden,)),
        "head/kernel": _columns("lm_head", vocab, hidden),
    }
    for number in range(config.num_hidden_layers):
        layer = {
            "input_norm/scale": _plain("input_layernorm", (hidden,)),
            "post_norm/scale": _plain("post_attention_layernorm", (hidden,)),
        }
        layer |= {f"attention/{k}": v for k, v in _attention(config).items()}
        feed_forward = _moe(config) if config.is_moe(number) else _dense(config)
        layer |= {f"mlp/{k}": v for k, v in feed_forward.items()}
        for name, source in layer.items():
            names = tuple(f"model.layers.{number}.{x}" for x in source.names)
            found[f"layers/{number}/{name}"] = source._replace(names=names)
    return found


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published layout, FP8's scales apart."""
    return {name: source.shape for source in sources(config).values() for name in source.names}


def _attention(config):
    heads, lora, hidden = config.num_attention_heads, config.q_lora_rank, config.hidden_size
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    queries, both = heads * config.qk_head_dim, (heads * (nope + value), LATENT_DIM)

    def up(name, first, last):
        convert = functools.partial(_heads, heads=heads, first=first, last=last)
        return Source((f"self_attn.{name}.weight",), both, convert, P("model"))

    found = {
        "kv_a/kernel": _matrix("self_attn.kv_a_proj_with_mqa", LATENT_DIM + ROPE_DIM, hidden, P()),
        "kv_norm/scale": _plain("self_attn.kv_a_layernorm", (LATENT_DIM,)),
        "k_up": up("kv_b_proj", 0, nope),
        "v_up": up("kv_b_proj", nope, nope + value),
        "o/kernel": _rows("self_attn.o_proj", hidden, heads * value),
    }
    if lora is None:
        return found | {"q/kernel": _columns("self_attn.q_proj", queries, hidden)}
    return found | {
        "q_a/kernel": _matrix("self_attn.q_a_proj", lora, hidden, P()),
        "q_norm/scale": _plain("self_attn.q_a_layernorm", (lora,)),
        "q/kernel": _columns("self_attn.q_b_proj", queries, lora),
    }


def _dense(config, width=None, prefix="mlp"):
    width = width or config.intermediate_size
    return {
        "gate/kernel": _columns(f"{prefix}.gate_proj", width, config.hidden_size),
        "up/kernel": _columns(f"{prefix}.up_proj", width, config.hidden_size),
        "down/kernel": _rows(f"{prefix}.down_proj", config.hidden_size, width),
    }


def _moe(config):
    experts, hidden = config.n_routed_experts, config.hidden_size
    inner = config.moe_intermediate_size

    def stack(name, rows, columns):
        names = tuple(f"mlp.experts.{e}.{name}.weight" for e in range(experts))
        return Source(names, (rows, columns), _transpose, P("model"), stacked=True)

    found = {
        "router/kernel": _matrix("mlp.gate", experts, hidden, P()),
        "gate": stack("gate_proj", inner, hidden),
        "up": stack("up_proj", inner, hidden),
        "down": stack("down_proj", hidden, inner),
    }
    if config.topk_method == "noaux_tc":
        name = "mlp.gate.e_score_correction_bias"
        found["bias"] = Source((name,), (experts,), _same, P())
    if config.n_shared_experts:
        shared = _dense(config, inner * config.n_shared_experts, "mlp.shared_experts")
        found |= {f"shared/{name}": source for name, source in shared.items()}
    return found


def _plain(name, shape):
    return Source((f"{name}.weight",), shape, _same, P())


def _matrix(name, outputs, inputs, spec):
    """Published as `[outputs, inputs]`, kept as `[inputs, outputs]`."""
    return Source((f"{name}.weight",), (outputs, inputs), _transpose, spec)


def _columns(name, outputs, inputs):
    """Outputs divided: each device computes some of them."""
    return _matrix(name, outputs, inputs, P(None, "model"))


def _rows(name, outputs, inputs):
    """Inputs divided: each device computes a part of the sum."""
    return _matrix(name, outputs, inputs, P("model", None))


def _same(tensor):
    return tensor


def _transpose(tensor):
    return tensor.T


def _heads(tensor, heads, first, last):
    """Rows `first` to `last` of each head: `[heads, last - first, inputs]`."""
    return tensor.reshape(heads, -1, tensor.shape[-1])[:, first:last]


def check_divides(config: Config, devices: int) -> None:
    """Raises a ValueError if the mesh axis "model" cannot be so many devices."""
    divided = {"num_attention_heads": config.num_attention_heads, "vocab_size": config.vocab_size}
    for number in range(config.num_hidden_layers):
        if config.is_moe(number):
            divided["n_routed_experts"] = config.n_routed_experts
            if config.n_shared_experts:
                width = config.moe_intermediate_size * config.n_shared_experts
                divided["the shared experts' width"] = width
        else:
            divided["intermediate_size"] = config.intermediate_size
    for name, size in divided.items():
        if size % devices:
            raise ValueError(
                f"mesh: expected an axis model that divides {name}, {size}, got {devices} devices"
            )
