"""Nat: from flows and the edges between them to conversations, with path, translations, losses and latencies.

Pure functions over columns. It never looks at packets again and decides no match.
"""
