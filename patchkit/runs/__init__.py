"""What ``patchkit run``, ``compare`` and ``doctor`` do: load a model, call it, measure it, and write what came out."""
