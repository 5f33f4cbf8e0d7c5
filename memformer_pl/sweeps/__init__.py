"""Tables of many runs: what their rows are, how all of them are trained, and what is made of the results."""
