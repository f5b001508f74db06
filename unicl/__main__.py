"""`python -m unicl`."""

import sys

from unicl.cli import main

sys.exit(main())
