"""A helper that ends by itself: whoever started it may be gone.

A shell starts a watcher beside tcpdump and then becomes tcpdump, so that signals, messages and the exit code are
tcpdump's own. The watcher goes with it, since tcpdump is the container's first process. Text only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What the watcher says when it ends the capture because of its size.
SIZE_REACHED: Final = "the capture has reached its greatest size"

#: What it says when the disk is as good as full. tcpdump does not look at what becomes of a packet that it writes.
DISK_FULL: Final = "no space left where the engine keeps the capture"

#: Bytes that are left to others there.
_LEAST_FREE: Final = 8 << 20

#: Arguments: seconds, bytes, what lies above the folder of this helper's files, that folder, command.
#: The files of all helpers count, by what they hold: blocks say more on some file systems (xfs allocates ahead).
_SCRIPT: Final = f"""
mkdir -p "$3/$4" || exit
{{
  left=$1
  while [ "$left" -gt 0 ]; do
    sleep 1 || break
    left=$((left - 1)) total=0
    for size in $(stat -c %s "$3"/*/* 2> /dev/null); do total=$((total + size)); done
    if [ "$total" -ge "$2" ]; then
      echo "tcpdump: {SIZE_REACHED}" >&2
      break
    fi
    if free=$(stat -f -c "%a * %S" "$3" 2> /dev/null) && [ $(($free)) -lt {_LEAST_FREE} ]; then
      echo "tcpdump: {DISK_FULL}" >&2
      break
    fi
  done
  [ "$left" -gt 0 ] || echo "tcpdump: the capture has reached its longest time" >&2
  while kill -INT 1 && sleep 1; do :; done
}} < /dev/null > /dev/null &
shift 4
exec "$@"
"""


def watched(command: Sequence[str], *, seconds: int, max_bytes: int, volume: str, folder: str) -> list[str]:
    """Return a command line that makes ``volume/folder`` and runs `command` as the first process of a container.

    It gets SIGINT after so many seconds, when all files in the folders of `volume` have so many bytes together, or
    when there is no space left (looked at once a second).
    """
    return ["sh", "-c", _SCRIPT, "nattrace", str(seconds), str(max_bytes), volume, folder, *command]
