"""Benchmarks: each writes JSON with its environment and checks correctness first."""
