"""``python -m bon`` is the command ``bon``."""

import sys

from bon.cli import main

sys.exit(main())
