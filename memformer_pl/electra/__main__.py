"""Entry point of ``python -m memformer_pl.electra``."""

from memformer_pl.__main__ import end_with_code_of_signals

if __name__ == "__main__":
    end_with_code_of_signals()
    from memformer_pl.electra.command_line import main

    main()
