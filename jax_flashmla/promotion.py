"""Promotions inside this package are its own, however strict the user's program is about them."""

import functools
from collections.abc import Callable

import jax


def own_promotions(fun: Callable) -> Callable:
    """`fun` with operands of any ranks and dtypes allowed, as JAX does by default."""

    @functools.wraps(fun)
    def wrapped(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return fun(*args, **kwargs)

    return wrapped
