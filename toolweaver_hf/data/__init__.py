"""Tools, queries and trajectories, and readers of their file formats."""
