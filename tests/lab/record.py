"""Record every scenario of the lab as a fixture: ``python tests/lab/record.py [SCENARIO...]``, as root.

Each folder under tests/fixtures/lab holds the pcaps, what conntrack printed, the parsed truth, and a README
that says how it was made. Recording again gives other ids, ports and times and the same story.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from lab.scenarios import SCENARIOS  # noqa: E402  # only importable once tests/ is on the path
from lab.topology import missing  # noqa: E402

FIXTURES = TESTS / "fixtures" / "lab"
#: What one fixture may weigh; the repository carries them all.
MAX_FIXTURE_BYTES = 100_000


def record(name: str, into: Path) -> None:
    """Run one scenario and leave its fixture in the folder `into`, replacing what was there.

    Raises RuntimeError when the fixture is larger than MAX_FIXTURE_BYTES.
    """
    scenario = SCENARIOS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        truth = scenario(folder)
        truth.save(folder / "truth.json")
        (folder / "README.md").write_text(_recipe(name, (scenario.__doc__ or "").splitlines()[0]))
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MAX_FIXTURE_BYTES:
            raise RuntimeError(f"{name} weighs {size} bytes, more than {MAX_FIXTURE_BYTES}")
        into.mkdir(parents=True, exist_ok=True)
        for old in into.iterdir():
            old.unlink()
        for path in sorted(folder.iterdir()):
            (into / path.name).write_bytes(path.read_bytes())


def _recipe(name: str, what: str) -> str:
    versions = [f"Linux {platform.release().split('-')[0]}"]
    for tool in ("iptables", "tcpdump", "conntrack"):
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        versions.append((done.stdout or done.stderr).splitlines()[0].strip())
    return (
        f"# {name}\n\n{what}\n\n"
        f"Recorded from real kernel NAT between network namespaces ({'; '.join(versions)}) with\n\n"
        f"    sudo python tests/lab/record.py {name}\n\n"
        "One pcap for each observation point; conntrack*.txt is what `conntrack -E` and then `conntrack -L` "
        "printed; truth.json is that, parsed.\n"
    )


def main(names: list[str]) -> int:
    """Record the named scenarios, or all of them."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)  # noqa: T201  # a script speaks to its caller
        return 2
    for name in names or SCENARIOS:
        record(name, FIXTURES / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
