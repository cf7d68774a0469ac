"""`python -m gdfast` is the same as `gdfast`."""

import sys

from gdfast.cli import main

sys.exit(main())
