"""``python -m unimoe``, the same as ``unimoe``."""

import sys

from .cli import main

sys.exit(main())
