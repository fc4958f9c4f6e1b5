"""``train_meta.py``, but its second process is killed before an update whose number comes first, once."""

import os
import signal
import sys

from metatele.cli.train import main
from metatele.command_line import run_program
from metatele.training.trainer import Trainer

if __name__ == "__main__":
    last, step = int(sys.argv.pop(1)), Trainer.step

    def dying(self, *args, **kwargs):
        """Be killed at that update, or make it."""
        if self.update == last and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.step = dying
    run_program(main, "train_meta.py")
