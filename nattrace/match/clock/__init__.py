"""Clock: two hosts, two clocks: the offset and drift between captures, from causality, and the times corrected by them."""
