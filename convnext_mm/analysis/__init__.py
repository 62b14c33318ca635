"""What measures networks and machines."""
