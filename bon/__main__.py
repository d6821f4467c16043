"""``python -m bon`` is the command ``bon``."""

import os
import sys

if sys.path[0] in ("", os.getcwd()):  # a file named torch.py in the current folder must not take the place of torch
    sys.path.append(sys.path.pop(0))

from bon.cli import main

sys.exit(main())
