"""``python -m refgemma``, the same program as the command ``refgemma``."""

import sys

from refgemma.cli import main

if __name__ == "__main__":
    sys.exit(main())
