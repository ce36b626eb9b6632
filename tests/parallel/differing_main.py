"""`speedit`, but the ranks share samples or do not, as if their machines had different configs.

torchrun --standalone --nproc_per_node 2 differing_main.py -c CONFIG -p train ...
"""

import os
import sys

from speedit_plugins.cli import main

sys.exit(main([*sys.argv[1:], f"sequence_parallel={1 + int(os.environ['RANK'])}"]))
