"""Depth: images with a depth map, the paper's third dimension (Florence, figure 1)."""
