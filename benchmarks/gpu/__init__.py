"""One command that checks and measures everything a GPU is needed for: ``python -m benchmarks.gpu --out DIR``."""
