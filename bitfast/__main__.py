"""``python -m bitfast`` is the command ``bitfast``."""

import sys

from bitfast.cli import main

sys.exit(main())
