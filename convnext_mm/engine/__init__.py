"""What trains: optimizer wrappers, hooks, the runner and its launch."""
