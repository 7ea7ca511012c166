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
import numpy as np
from jax import core
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flashmla.partition import is_sharded, spec_of
from jax_flashmla.promotion import own_promotions

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
    """A lowering that traces `fun(*args, config=...)`, which returns a tuple.

    `fun` sees shapes and dtypes only. What operands are in a mesh (varying over an axis of a
    `shard_map`, sharded over an explicit one) was settled by the abstract evaluation; traced once
    more, it would have to be repeated for every constant and loop inside. Nor does it see how
    strict the user's own program is about promotions.
    """
    lower = mlir.lower_fun(own_promotions(fun), multiple_results=True)

    def lowering(ctx, *operands, **params):
        ctx = ctx.replace(
            avals_in=[_without_mesh(aval) for aval in ctx.avals_in],
            avals_out=[_without_mesh(aval) for aval in ctx.avals_out],
        )
        return lower(ctx, *operands, **params)

    return lowering


def _without_mesh(aval):
    return core.ShapedArray(aval.shape, aval.dtype)


def result_aval(
    operands: Sequence, shape: tuple[int, ...], dtype, spec: PartitionSpec | None = None
) -> core.ShapedArray:
    """The abstract value of a result that is computed from all of `operands`.

    `spec` says how it is sharded over explicit mesh axes; by default it is not. Inside a
    `shard_map` it varies over every mesh axis that one of the operands varies over.
    """
    varying = frozenset().union(*(operand.manual_axis_type.varying for operand in operands))
    spec = PartitionSpec(*[None] * len(shape)) if spec is None else spec
    inner = _innermost(operands)
    return inner.update(
        shape=shape,
        dtype=dtype,
        weak_type=False,
        sharding=inner.sharding.update(spec=spec),
        manual_axis_type=inner.manual_axis_type.update(varying=varying),
    )


def _innermost(avals):
    """One that knows of all meshes: what the body of a `shard_map` closes over does not."""
    return max(avals, key=lambda aval: len(_manual_axes(aval.sharding.mesh)))


def _manual_axes(mesh) -> list[str]:
    """Those that a `shard_map` around the operation has divided already."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in types if kind == AxisType.Manual]


class _Devices(tuple):
    """A parameter that says little in a printed jaxpr."""

    def __repr__(self):
        return "needed"


@functools.cache
def needs_devices() -> tuple:
    """A parameter that makes `jax.jit` tell lowerings its devices, as `lower_on_mesh` needs.

    jit looks for operations that need them, in jaxprs among the parameters too. This is the
    shortest jaxpr with one; nothing ever runs it.
    """
    ask = functools.partial(jax.debug.inspect_array_sharding, callback=id)
    return _Devices([jax.make_jaxpr(ask)(jax.ShapeDtypeStruct((), np.float32))])


def lower_on_mesh(ctx, operands, fun: Callable, rule: tuple[str, Sequence[str]], divide: Callable):
    """Lowers `fun(*operands)`, shared between the devices if there are several.

    On a mesh with explicit axes, by the shardings that are part of the operands' types, which the
    abstract evaluation has checked; on others by those that XLA chooses. On one device, and in the
    body of a `shard_map`, there is nothing to share.

    Args:
      ctx: the lowering's context.
      operands: of the lowering.
      fun: returns a tuple.
      rule: Shardy's, which says what axes of operands and results belong together, and the axes of
        it that stay whole.
      divide: `(specs of the operands) -> (function of a device's parts, their specs, those of the
        results)`; it may ask for other specs than it was given.
    """
    avals = ctx.avals_in
    mesh = _innermost(avals).sharding.mesh
    several = getattr(ctx.module_context.axis_context, "num_devices", 1) > 1
    if is_sharded(avals):
        fun = _over_explicit_axes(mesh, *divide([spec_of(aval) for aval in avals]))
    elif several and AxisType.Explicit not in mesh.axis_types:
        fun = _partitioned(fun, *rule, divide)
    return lower_as_jax(fun)(ctx, *operands)


def _over_explicit_axes(mesh, part, in_specs, out_specs):
    """`part` on every device. Traced where operands have no shardings in their types."""
    axes = set(mesh.axis_names) - set(_manual_axes(mesh))
    mesh = mesh.update_axis_types(dict.fromkeys(axes, AxisType.Auto))
    specs = {"in_specs": in_specs, "out_specs": out_specs}

    def run(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.shard_map(part, mesh=mesh, axis_names=axes, check_vma=False, **specs)(
                *operands
            )

    return run


def _partitioned(fun, rule, whole, divide):
    """`fun`, divided once XLA has chosen the shardings."""

    @custom_partitioning
    def function(*operands):
        return fun(*operands)

    def partition(mesh, operands, results):
        del results
        part, in_specs, out_specs = divide([spec_of(operand) for operand in operands])

        def on_mesh(specs):
            return tuple(NamedSharding(mesh, spec) for spec in specs)

        return mesh, own_promotions(part), on_mesh(out_specs), on_mesh(in_specs)

    function.def_partition(
        partition=partition, sharding_rule=rule, need_replication_factors=tuple(whole)
    )
    return function


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _bind(*args, primitive, params):
    return primitive.bind(*args, **dict(params))


def _apply_under_jit(primitive, *args, **params):
    with jax.disable_jit(False):  # an operation has no other way to run
        return _bind(*args, primitive=primitive, params=tuple(sorted(params.items())))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_derivative(name: str, x: jax.Array) -> jax.Array:
    """`x`, on its way into operation `name`, which would drop its tangents without a word."""
    del name
    return x


@without_derivative.defjvp
def _without_derivative_jvp(name, primals, tangents):
    _refuse_derivative(name, primals, tangents)


def _refuse_derivative(name, primals, tangents, **params):
    raise NotImplementedError(
        f"{name} has no derivative: it is an inference operation. Wrap its inputs in "
        "jax.lax.stop_gradient, or use a differentiable attention for training."
    )
