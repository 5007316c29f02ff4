"""A contestant that the system kills, as where memory is short."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
