"""Benchmarks of the simulation, run by hand: `make bench-simulation`."""
