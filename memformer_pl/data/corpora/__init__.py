"""Where documents come from: a module for each source."""
