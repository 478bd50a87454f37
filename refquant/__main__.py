"""``python -m refquant`` is ``refquant``."""

import sys

from .cli import main

sys.exit(main())
