"""Errors that callers of the engine tell apart."""


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
