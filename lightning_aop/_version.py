"""The package's version, which anything may import."""

__version__ = "0.1.0"
