"""Captured text made harmless, one function per kind of output.

Point names, file names, comments and rule texts come from captures and hosts that nobody vouches for. A
renderer passes every such text through the function of its output before it writes it. This module never
shortens a text and never drops a character silently: what cannot be shown is shown as its escape.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii

#: First characters that make a spreadsheet read a cell as a formula (OWASP, CSV Injection).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def terminal(text: str) -> str:
    r"""Return `text` in printable characters only, on one line.

    Control characters (ANSI sequences begin with one), line and paragraph separators, bidirectional and
    other format characters, unusual spaces, private, unassigned and surrogate code points become ``\x1b``,
    ``\u202e`` or ``\U000e0001``. These are the characters that `str.isprintable` calls not printable
    (Unicode categories "Other" and "Separator", the ASCII space excepted).
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _visible(character) for character in text)


def well_formed(text: str) -> str:
    r"""Return `text` without lone surrogates, which UTF-8 cannot hold (RFC 3629 section 3).

    Python gives file names that are not UTF-8 as surrogates U+DC80..U+DCFF (PEP 383), one a byte; such a byte
    becomes ``\xff``, any other surrogate ``\ud800``.
    """
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return "".join(
        _visible(character) if "\ud800" <= character <= "\udfff" else character for character in text
    )


def json_string(text: str) -> str:
    """Return `text` as a JSON string, quotes included, in ASCII (RFC 8259 section 7)."""
    return encode_basestring_ascii(well_formed(text))


def csv_cell(text: str) -> str:
    """Return `text` for one CSV cell: printable, on one line, and never a formula.

    A text that a spreadsheet would execute gets an apostrophe in front. Quotes and commas are left to the
    CSV writer.
    """
    return "'" + terminal(text) if text.startswith(FORMULA_STARTS) else terminal(text)


def _visible(character: str) -> str:
    r"""Return the escape of one character, as Python would write it."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8 (PEP 383)
        code -= 0xDC00
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
