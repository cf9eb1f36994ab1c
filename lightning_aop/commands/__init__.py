"""The commands that work on photos: explain, compare and sanity-check."""
