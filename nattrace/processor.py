"""numpy, loaded as suits this processor and a program that starts workers of its own.

What numpy reads from the environment it reads once, while it is loaded. A program's numpy is its own, so only the
command line does this, never the library; whoever has set one of the variables has the last word, and workloads and
helpers that a command starts see nothing of it.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import Final

#: numpy multiplies no matrices here, but OpenBLAS starts a thread for every processor, and each of them waits busily:
#: some 70 ms of the processor that a worker could have.
_ONE_THREAD: Final = ("OPENBLAS_NUM_THREADS", "1")

#: numpy's AVX-512 sort lives on compress-stores, which Zen 4 does in microcode and AMD says to avoid ("Software
#: Optimization Guide for the AMD Zen4 Microarchitecture", 57647, section 2.11.2). Measured there: 262,144 keys in
#: 12.3 ms, with AVX2 in 2.9 ms. The first name is numpy 2.4's, the others are those of older versions.
_AVX2_SORT: Final = ("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_SKX AVX512_ICL")

#: Enough of /proc/cpuinfo for its first processor; all of it takes milliseconds where there are many.
_CPUINFO_BYTES: Final = 4096


def load_numpy() -> None:
    """Import numpy, unless it is loaded already."""
    if "numpy" in sys.modules:
        return
    wanted = [_ONE_THREAD]
    with suppress(OSError), open("/proc/cpuinfo", "rb") as stream:  # noqa: PTH123 - a few bytes of no real file
        if stores_compressed_slowly(stream.read(_CPUINFO_BYTES)):
            wanted.append(_AVX2_SORT)
    added = {name: value for name, value in wanted if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # about names that this numpy does not know
            import numpy  # noqa: F401, ICN001, PLC0415
    finally:
        for name in added:
            del os.environ[name]


def stores_compressed_slowly(cpuinfo: bytes) -> bool:
    """Say whether /proc/cpuinfo is that of an AMD processor of family 25 with AVX-512: Zen 4."""
    fields = dict(line.split(b":", 1) for line in cpuinfo.replace(b"\t", b"").splitlines() if b":" in line)
    return (
        fields.get(b"vendor_id", b"").strip() == b"AuthenticAMD"
        and fields.get(b"cpu family", b"").strip() == b"25"
        and b"avx512f" in fields.get(b"flags", b"").split()
    )
