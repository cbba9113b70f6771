"""``python -m unimoe``, the same as ``unimoe``."""

import sys

from unimoe.commands.main import main

sys.exit(main())
