"""`pytest benchmarks/` collects the contests of every op for pytest-benchmark."""

collect_ignore_glob = ["results/*"]
