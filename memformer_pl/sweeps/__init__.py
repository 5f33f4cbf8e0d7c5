"""Tables of many runs: their rows, the training of every row, and the tables and figures of the results."""
