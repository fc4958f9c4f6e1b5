"""Meta-train the LSTM optimizers of learned teleport.

python train_meta.py quick --method update-tele --seed 0 --device auto --out runs/quick
python train_meta.py quick --out runs/quick --resume      # after a kill
python train_meta.py --help                               # every setting
"""

from metatele.cli.train import main
from metatele.command_line import run_program

if __name__ == "__main__":
    run_program(main, "train_meta.py")
