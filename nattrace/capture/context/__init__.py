"""Context: what the host of a capture knows before it, meanwhile and after it, asked here or in a helper."""
