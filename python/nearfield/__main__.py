"""``python -m nearfield``."""

import sys

from nearfield.cli import main

sys.exit(main())
