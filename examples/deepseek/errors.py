"""Errors that callers tell apart."""

import jax


class InvalidRequestError(ValueError):
    """A request that cannot be served as it is. The message begins with the field at fault.

    Attributes:
      field: its name.
    """

    def __init__(self, field: str, message: str):
        """Makes the message of both."""
        super().__init__(f"{field}: {message}")
        self.field = field


class EngineClosedError(RuntimeError):
    """The engine no longer runs, or stopped before the request was done."""


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device had no room for what JAX asked of it: the class says nothing of it."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
