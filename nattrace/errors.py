"""What can go wrong, as exceptions a caller can tell apart.

Every message is one line that says what is wrong, where (which file, which byte or frame) and what to try.
"""


class NattraceError(Exception):
    """Base of every error that nattrace raises on purpose."""


class InputError(NattraceError):
    """A source cannot be read: missing, not a capture, damaged before its first record, over a limit."""


class UsageError(NattraceError):
    """The request itself makes no sense: an unknown format, two points with one name, no source."""


class MissingToolError(NattraceError):
    """An optional helper (tshark, pyarrow) is needed for what was asked and is not there."""
