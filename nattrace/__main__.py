"""``python -m nattrace``: the same as the command ``nattrace``."""

import sys

from nattrace.cli import main

if __name__ == "__main__":
    sys.exit(main())
