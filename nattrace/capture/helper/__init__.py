"""Helper: the image, and the containers made from it: tcpdump, keepers of a bridge, answers of a host elsewhere."""
