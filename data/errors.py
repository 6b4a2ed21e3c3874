"""The one error that the data package shows to users."""


class DataError(Exception):
    """One clear line that names the thing and the mend. Entry points print it and exit with status 2."""


class BadSample(DataError):
    """One sample that cannot be used; the stream puts another in its place and writes it down."""
