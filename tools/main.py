"""`python tools/main.py -c CONFIG -p PHASE [key=value ...]`: the same command line as `speedit`."""

import sys

from speedit_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
