"""The version of the package: a leaf, so that files and reports can name it without importing the package's face."""

__version__ = "0.1.0"
