"""patchkit.recipes."""
