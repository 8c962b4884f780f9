"""``python -m hetis_exec``."""

import sys

if __name__ == "__main__":
    # Worker processes read this file again: what only the command needs is imported for it alone.
    from hetis_exec.cli import main

    sys.exit(main())
