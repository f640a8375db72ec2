"""patchkit.kernels."""
