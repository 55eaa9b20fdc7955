"""Measures of rankings and of agents' runs, the rivals, judges and simulated tools."""
