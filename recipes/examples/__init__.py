"""Recipe files that come with patchkit; `patchkit run NAME` runs one."""
