"""Engines: which one is asked and how it is reached, and what it knows of networks and containers."""
