"""`python -m benchmarks <stem>`: check every contestant against float64, then time them all."""
