"""Evaluate meta-trained optimizers on held-out trajectories, beside tuned standard optimizers.

python eval_meta.py runs/quick runs/other --trajectories 64 --steps 100 --seed 1 --out runs/quick-evaluation
"""

from metatele.cli.evaluate import main
from metatele.command_line import run_program

if __name__ == "__main__":
    run_program(main, "eval_meta.py")
