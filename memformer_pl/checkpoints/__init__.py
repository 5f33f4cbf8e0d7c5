"""The format of checkpoints, and loading a model and its tokenizer from a checkpoint, a folder or the hub."""
