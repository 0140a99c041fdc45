"""A server that classifies images with many adapters of one backbone; needs the extra ``serve``."""
