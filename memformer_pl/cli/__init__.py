"""The command line: ``python -m memformer_pl COMMAND``. ``main.py`` picks the command."""
