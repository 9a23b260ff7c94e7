"""Layouts of one model over several GPUs, for `jax.shard_map`: the mesh, which axis of each parameter and of the page
pool is split over it, and the collectives that join the parts. Parameters already name their axes (`ParamSpec.axes` in
slora_jax/model_config.py) and a `Geometry` describes one device's part, so a layout is a mapping from those names to
mesh axes.
This package imports jax only; slora_jax uses it, never the other way.
"""
