"""Renumber: boxes that change what packets are known by: TCP numbers, options, IP identifications."""
