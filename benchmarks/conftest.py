"""Results are kept by machine: figures of two machines say nothing about each other."""

from pathlib import Path

import pytest

from gdfast.bench import machine

_DEFAULT_STORAGE = "file://./.benchmarks"  # pytest-benchmark's own


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark opens its storage
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "benchmark_storage", None) == _DEFAULT_STORAGE:
        folder = Path(__file__).parent / "results" / machine.slug()
        config.option.benchmark_storage = f"file://{folder}"
