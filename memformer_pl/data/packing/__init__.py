"""A corpus becomes token files on disk, once: splits, tokens, offsets."""
