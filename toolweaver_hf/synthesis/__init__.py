"""Training data from a catalog alone: queries that a language model writes, and a filter of what it wrote."""
