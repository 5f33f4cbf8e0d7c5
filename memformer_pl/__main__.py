"""``python -m memformer_pl``."""

from memformer_pl.cli import main

if __name__ == "__main__":
    main()
