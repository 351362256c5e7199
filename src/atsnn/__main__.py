"""``python -m atsnn``: the command, as ``accelerate launch -m atsnn`` starts it."""

import sys

from .cli import main

sys.exit(main())
