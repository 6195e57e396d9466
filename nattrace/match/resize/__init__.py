"""Resize: packets that changed size between two points: segmented, merged, fragmented, reassembled."""
