"""Images and networks: read, built, generated."""
