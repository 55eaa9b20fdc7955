"""Tools, queries and trajectories: what is read from files, and in which formats."""
