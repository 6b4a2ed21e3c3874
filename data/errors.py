"""The one error that the data package shows to users, and how messages write names."""


class DataError(Exception):
    """One clear line that names the thing and the fix. Entry points print it and exit with status 2."""


class BadSample(DataError):
    """One sample that cannot be used; the stream replaces it by another and logs it."""


def printable(name: str) -> str:
    """Returns a file's name as text that can be encoded; bytes that are not UTF-8 are written \\xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
