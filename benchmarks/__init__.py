"""What measures speed, side by side. Results, with the machine they were taken on, are in docs/07-benchmarks.md."""
