"""Measures of rankings and of agent runs, baselines, judges and simulated tools."""
