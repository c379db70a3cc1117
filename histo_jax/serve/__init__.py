"""A web page and a JSON interface for trained networks: `python -m histo_jax.serve --workdir=RUN`.

It uses networks through `Predictor`, makes maps by the functions of `wsi`, and attributions by
those of `report`. The libraries of the server are the extra `serve`, imported on first use.
"""
