"""Models that act: episodes of an environment as documents of observations and actions, and the gradient of their
return, exact through whole episodes at the memory of one segment.

Needs popgym, which the extra ``acting`` installs.
"""
