"""Errors: ICMP errors, matched through the packets that they quote."""
