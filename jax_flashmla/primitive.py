"""How a JAX primitive is declared here: the only module that uses jax.extend and jax.interpreters.

Every operation is two primitives:

* the *outer* one is what users trace. It has any number of group axes, batching rules and (where a
  mesh is involved) a partitioning; it lowers to the inner one.
* the *inner* one works on the operands of one device, with exactly one group axis, and has one
  lowering per platform: the FFI call on CUDA where a kernel fits, plain JAX everywhere else.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# A lowering rule: (LoweringRuleContext, *ir_values, config=...) -> sequence of ir values.
LoweringRule = Callable[..., Sequence]


def define_primitive(
    name: str,
    *,
    abstract: Callable,
    lowering: LoweringRule,
    platform_lowerings: Mapping[str, LoweringRule] | None = None,
    batcher: Callable | None = None,
) -> Primitive:
    """Returns a primitive with several results, no derivative, and the given rules.

    Args:
      name: what `jax.make_jaxpr` prints.
      abstract: `(*avals, config) -> [ShapedArray, ...]`.
      lowering: the rule for every platform that `platform_lowerings` does not name.
      platform_lowerings: rules by platform, e.g. `{"cuda": ...}`.
      batcher: `(args, dims, *, config) -> (outs, out_dims)`; none for inner primitives, which are
        bound only while lowering.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(_apply_under_jit, primitive))
    mlir.register_lowering(primitive, lowering)
    for platform, rule in (platform_lowerings or {}).items():
        mlir.register_lowering(primitive, rule, platform=platform)
    if batcher is not None:
        batching.primitive_batchers[primitive] = batcher
    ad.primitive_jvps[primitive] = functools.partial(_refuse_derivative, name)
    return primitive


def lower_as_jax(fun: Callable) -> LoweringRule:
    """A lowering that traces `fun(*args, config=...)`, which returns a tuple."""
    return mlir.lower_fun(fun, multiple_results=True)


@functools.partial(jax.jit, static_argnames=("primitive", "config"))
def _bind(*args, primitive, config):
    return primitive.bind(*args, config=config)


def _apply_under_jit(primitive, *args, config):
    return _bind(*args, primitive=primitive, config=config)


def _refuse_derivative(name, primals, tangents, **params):
    raise NotImplementedError(
        f"{name} has no derivative: it is an inference operation. Wrap its inputs in "
        "jax.lax.stop_gradient, or use a differentiable attention for training."
    )
