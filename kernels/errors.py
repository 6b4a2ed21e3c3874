"""The one error of the kernels that a user can cause, by an environment variable."""


class BackendError(ValueError):
    """One line for entry points to print: a backend that does not exist, or cannot serve a call."""
