"""`hf-stable run` as a module, for `python -m`, `torchrun -m` and `accelerate launch -m`."""

from hf_stable.commands.launch.launcher import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
