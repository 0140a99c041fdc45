"""What several benchmarks share, and what stands in for what is measured against or is missing here."""
