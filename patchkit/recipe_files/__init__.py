"""Recipe files: read with the place of every field, checked field by field, written, and described as a JSON schema."""
