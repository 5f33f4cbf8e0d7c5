"""Class-incremental learning under a budget in bytes: MEMO and its rivals.

Classes arrive task by task; a method may keep parts of its network and images of old classes, and both are paid for
from one budget. Nothing here knows the sequence models. ``python -m memformer_pl.continual fit`` trains.
"""
