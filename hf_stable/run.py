"""`hf-stable run` as a module, for `python -m`, `torchrun -m` and `accelerate launch -m`."""

import sys

from hf_stable.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
