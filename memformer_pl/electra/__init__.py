"""ELECTRA with a buffer of corrupted examples between generator and discriminator (Transformer with Memory Replay).

Stands apart from the sequence models: no state, no segments. ``python -m memformer_pl.electra fit --config
electra/base`` trains it; ``experiments/electra/README.md`` says what for.

    B  examples     L  tokens of an example     D  width     V  vocabulary     P  masked places of an example
"""
