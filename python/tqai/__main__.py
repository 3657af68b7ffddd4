"""``python -m tqai``: the command line."""

import sys

from tqai.cli import main

sys.exit(main())
