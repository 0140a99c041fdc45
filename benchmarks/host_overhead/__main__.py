"""``python -m benchmarks.host_overhead``."""

from benchmarks.host_overhead.overhead import main

main()
