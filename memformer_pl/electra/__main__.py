"""Entry point of ``python -m memformer_pl.electra``."""

from memformer_pl.electra.cli import main

if __name__ == "__main__":
    main()
