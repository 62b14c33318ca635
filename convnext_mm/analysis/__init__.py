"""What measures networks, machines and runs, and draws the results."""
