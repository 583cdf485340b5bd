"""``python -m kdlsq_fx``."""

import sys

from kdlsq_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
