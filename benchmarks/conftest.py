"""Settings of the benchmarks."""


def pytest_benchmark_update_machine_info(config, machine_info):
    """Results are published: they name the processor, not the host."""
    machine_info.pop("node", None)
