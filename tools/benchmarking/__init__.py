"""What the benchmark and its relatives in tools/ are made of."""
