"""The benchmark of nattrace: run `python bench/bench.py`."""
