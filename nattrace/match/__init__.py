"""Match: which packets of several points are the same packet.

Reads packet tables and leaves flows, edges between flows, latency samples and unmatched packets. It never says
what was translated (that is `nat`), and touches no files; only `workers` starts processes.
"""
