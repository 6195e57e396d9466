"""numpy is loaded without threads of its own and, on Zen 4, without AVX-512; nothing of it stays in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nattrace.processor import stores_compressed_slowly

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: 17
flags\t\t: fpu vme avx2 {flags} sha_ni

"""


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "slowly"),
    [
        ("AuthenticAMD", 25, "avx512f avx512dq", True),  # Zen 4
        ("AuthenticAMD", 25, "fsgsbase", False),  # Zen 3
        ("AuthenticAMD", 26, "avx512f avx512dq", False),  # Zen 5
        ("GenuineIntel", 6, "avx512f avx512dq", False),
    ],
)
def test_only_zen_4_stores_compressed_slowly(vendor: str, family: int, flags: str, slowly: bool) -> None:
    text = CPUINFO.format(vendor=vendor, family=family, flags=flags)
    assert stores_compressed_slowly(text.encode()) is slowly
    assert stores_compressed_slowly(text.encode() * 2) is slowly


@pytest.mark.parametrize("cpuinfo", [b"", b"processor", b"vendor_id\t: AuthenticAMD\ncpu family"])
def test_what_cannot_be_read_is_no_zen_4(cpuinfo: bytes) -> None:
    assert not stores_compressed_slowly(cpuinfo)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_numpy_has_no_threads_and_the_environment_is_as_it_was() -> None:
    program = (
        "import os; before = dict(os.environ)\n"
        "from nattrace.processor import load_numpy; load_numpy()\n"
        "assert dict(os.environ) == before\n"
        "import numpy; print(numpy.arange(3).sum(), len(os.listdir('/proc/self/task')))"
    )
    assert _run(program) == "3 1"


def test_what_somebody_has_set_stays() -> None:
    program = (
        "from nattrace import processor\n"
        "processor.stores_compressed_slowly = lambda cpuinfo: True\n"
        "processor.load_numpy()\n"
        "import os; print(os.environ['NPY_DISABLE_CPU_FEATURES'], os.environ['OPENBLAS_NUM_THREADS'])"
    )
    assert _run(program, NPY_DISABLE_CPU_FEATURES="AVX512_SPR", OPENBLAS_NUM_THREADS="2") == "AVX512_SPR 2"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no /proc/cpuinfo to read")
def test_zen_4_sorts_without_avx512() -> None:
    program = (
        "from nattrace import processor\n"
        "processor.stores_compressed_slowly = lambda cpuinfo: True\n"
        "processor.load_numpy()\n"
        "try:\n    from numpy._core._multiarray_umath import __cpu_features__ as features\n"
        "except ImportError:\n    from numpy.core._multiarray_umath import __cpu_features__ as features\n"
        "print([name for name in ('X86_V4', 'AVX512_SKX', 'AVX512_ICL') if features.get(name)])"
    )
    assert _run(program) == "[]"


def _run(program: str, **variables: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "NPY_"))}
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=own | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()
