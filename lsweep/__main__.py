"""``python -m lsweep`` is ``lsweep``."""

import sys

from lsweep.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
