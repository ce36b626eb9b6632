"""`speedit` on a machine with the name in $MACHINE, so that tests have several on one.

    torchrun --nnodes 2 --nproc-per-node 2 ... machine_main.py -c CONFIG -p train ...

With $OWN_FOLDER it starts there, so that a relative `experiment_dir` is not that of the other machines.
"""

import os
import socket
import sys

from speedit_plugins import cli
from speedit_plugins.trainer.training.saving import shared_folder

socket.gethostname = lambda: os.environ["MACHINE"]
if folder := os.environ.get("OWN_FOLDER"):
    os.chdir(folder)
    # The time that NFS may need is not what is tested.
    shared_folder.NFS_SECONDS = 0.0
sys.exit(cli.main())
