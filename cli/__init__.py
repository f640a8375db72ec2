"""patchkit.cli."""
