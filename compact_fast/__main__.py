"""`python -m compact_fast`: the command, for launchers such as torchrun."""

import sys

from compact_fast.cli.main import main

sys.exit(main())
