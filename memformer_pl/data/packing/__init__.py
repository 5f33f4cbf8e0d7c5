"""Turn a corpus into token files once: splits, tokens and offsets."""
