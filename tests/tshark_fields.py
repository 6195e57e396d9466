"""What tshark says of a capture's packets, field by field. It knows nothing of nattrace."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def tshark_fields(path: Path, fields: Sequence[str]) -> tuple[list[list[str]], int]:
    """Return the fields' first occurrences in every packet, and tshark's exit code.

    Fragments are left as they are. tshark exits with 2 after the last packet of a file that ends in a record.
    """
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "occurrence=f"]
    command += ["-o", "ip.defragment:FALSE", *(word for field in fields for word in ("-e", field))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return [line.split("\t") for line in done.stdout.splitlines()], done.returncode
