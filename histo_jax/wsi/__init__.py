"""Whole-slide inference: from a slide to a map of probabilities, and to the files that show it.

It uses trained networks through `Predictor` alone. The libraries that read slides are the extra
`slides`; they are imported on first use.
"""
