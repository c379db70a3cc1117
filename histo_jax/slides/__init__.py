"""Slides: reading at a physical scale, tissue, the grid of cells, and annotations.

It knows neither networks nor JAX. The libraries are the extra `slides`, imported on first use.
"""
