"""What a checkpoint holds, and how a model and its tokenizer come back from one, or from a folder."""
