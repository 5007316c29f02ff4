"""`python -m rlhf_fast.cli`: the `rlhf-fast` command, where it is not on the path."""

import sys

from rlhf_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
