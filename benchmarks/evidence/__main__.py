"""``python -m benchmarks.evidence``."""

from benchmarks.evidence.runs import main

main()
