"""``python -m benchmarks.model``."""

from benchmarks.model.predict import main

main()
