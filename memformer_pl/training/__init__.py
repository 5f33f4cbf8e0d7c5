"""Train and evaluate any segment model with Lightning. Nothing is imported here: metrics need no Lightning."""
