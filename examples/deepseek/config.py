"""What a published `config.json` says of a DeepSeek-V2 or V3 model, checked."""

import dataclasses
import json
import pathlib

# What the pages of jax_flashmla hold of a token.
LATENT_DIM, ROPE_DIM = 512, 64

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
# A routing method of the configuration file, and the scoring function that goes with it.
TOPK_METHODS = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}
# Fields that V3's file leaves out of what V2's says, or the other way round.
DEFAULTS = {
    "q_lora_rank": None,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "rope_theta": 10000.0,
}
# What V3's routing is where transformers has saved the file: it leaves these two out.
V3_DEFAULTS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's extension of the rotary embedding (arXiv 2309.00071), by its published names."""

    factor: float  # how many times longer than in training a context may be
    original_max_position_embeddings: int
    beta_fast: float  # turns within the training length above which a frequency is kept
    beta_slow: float  # and below which it is interpolated
    mscale: float
    mscale_all_dim: float


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's dimensions and rules, by their published names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int | None
    n_shared_experts: int | None
    num_experts_per_tok: int | None
    moe_intermediate_size: int | None
    n_group: int
    topk_group: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Yarn | None
    fp8_block: tuple[int, int] | None  # rows and columns that share a scale, of FP8 weights

    @property
    def qk_head_dim(self) -> int:
        """Columns of a query or key of one head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` routes tokens to experts."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )


def read_config(directory) -> Config:
    """The configuration of the checkpoint in `directory`.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: it is malformed, or describes a model that this code does not run; see
        `parse_config`.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint's config.json, found no such file")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(fields).__name__}")
    return parse_config(fields)


def parse_config(fields: dict) -> Config:
    """Checks the fields of a `config.json`.

    Raises:
      ValueError: naming the field, what was expected and what came: another architecture,
        dimensions that the decode does not take, a field missing or of no sense.
    """
    architectures = fields.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise ValueError(
            f"architectures: expected {' or '.join(ARCHITECTURES)}, got {architectures[0]}"
        )
    only_values = (("hidden_act", "silu"), ("attention_bias", False), ("rope_interleave", True))
    for name, only in only_values:
        if fields.get(name, only) != only:
            raise ValueError(f"{name}: expected {only}, got {fields[name]}")
    if fields.get("tie_word_embeddings", False):
        raise ValueError("tie_word_embeddings: expected false, as published, got true")

    # As transformers 5 saves it, with rope_theta in it.
    rope = _object(fields, "rope_parameters")
    if "rope_theta" in rope:
        fields = fields | {"rope_theta": rope["rope_theta"]}
    own = {field.name for field in dataclasses.fields(Config)} - {"rope_scaling", "fp8_block"}
    values = DEFAULTS | (V3_DEFAULTS if architectures[0] == ARCHITECTURES[1] else {})
    for name in own & fields.keys():
        if fields[name] is not None or name not in values:
            values[name] = fields[name]
    if missing := sorted(own - values.keys()):
        raise ValueError(f"{missing[0]}: expected it in config.json, and it is missing")
    config = Config(
        **values,
        rope_scaling=_parse_yarn(_object(fields, "rope_scaling") or rope),
        fp8_block=_parse_quantization(_object(fields, "quantization_config")),
    )
    _check_numbers(config)
    _check_routing(config)
    return config


def _object(fields, name) -> dict:
    """A field that is an object, empty if it is absent or null."""
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    return value


def _parse_yarn(fields) -> Yarn | None:
    if not fields:
        return None
    kind = fields.get("type", fields.get("rope_type"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling.type: expected yarn, got {kind}")
    values = {**YARN_DEFAULTS, **fields}
    for field in dataclasses.fields(Yarn):
        value = values.get(field.name)
        if not _is_number(value) or value < 0:
            raise ValueError(f"rope_scaling.{field.name}: expected a number, got {value!r}")
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        if values[name] == 0:
            raise ValueError(f"rope_scaling.{name}: expected a number above 0, got 0")
    if values["factor"] < 1:
        raise ValueError(f"rope_scaling.factor: expected at least 1, got {values['factor']}")
    return Yarn(**{field.name: values[field.name] for field in dataclasses.fields(Yarn)})


def _parse_quantization(fields) -> tuple[int, int] | None:
    if not fields:
        return None
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2
    if method != "fp8" or not is_block or not all(type(x) is int and x > 0 for x in block):
        raise ValueError(
            "quantization_config: expected quant_method fp8 with a weight_block_size of two "
            f"numbers, got {method} and {block}"
        )
    return tuple(block)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_numbers(config):
    optional = ("q_lora_rank", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    optional += ("moe_intermediate_size",)
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.type not in (int, int | None, float) or (value is None and field.name in optional):
            continue
        least = 0 if field.name == "first_k_dense_replace" else 1
        if field.type is float:
            if not _is_number(value) or value <= 0:
                raise ValueError(f"{field.name}: expected a number above 0, got {value!r}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{field.name}: expected an integer from {least}, got {value!r}")
    if config.rope_theta <= 1:
        raise ValueError(f"rope_theta: expected a number above 1, got {config.rope_theta}")
    for name, only in (("kv_lora_rank", LATENT_DIM), ("qk_rope_head_dim", ROPE_DIM)):
        if getattr(config, name) != only:
            raise ValueError(
                f"{name}: expected {only}, the width that the pages of jax_flashmla hold, "
                f"got {getattr(config, name)}"
            )


def _check_routing(config):
    if config.topk_method not in TOPK_METHODS:
        raise ValueError(
            f"topk_method: expected one of {', '.join(TOPK_METHODS)}, got {config.topk_method}"
        )
    scoring = TOPK_METHODS[config.topk_method]
    if config.scoring_func != scoring:
        raise ValueError(
            f"scoring_func: expected {scoring} with topk_method {config.topk_method}, "
            f"got {config.scoring_func}"
        )
    experts = config.n_routed_experts
    if experts is None:
        return
    for name in ("num_experts_per_tok", "moe_intermediate_size"):
        if getattr(config, name) is None:
            raise ValueError(f"{name}: expected a number with {experts} routed experts, got null")
    if experts % config.n_group:
        raise ValueError(f"n_group: expected a divisor of {experts} experts, got {config.n_group}")
    if config.topk_group > config.n_group:
        raise ValueError(
            f"topk_group: expected at most n_group, {config.n_group}, got {config.topk_group}"
        )
    grouped = config.topk_method != "greedy"
    reachable = experts // config.n_group * config.topk_group if grouped else experts
    if config.num_experts_per_tok > reachable:
        raise ValueError(
            f"num_experts_per_tok: expected at most {reachable}, the experts that a token can "
            f"reach, got {config.num_experts_per_tok}"
        )
