"""``python -m lightning_namo``: the same as the console script ``lightning-namo``."""

from lightning_namo.cli import main

if __name__ == "__main__":
    main()
