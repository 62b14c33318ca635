"""What a command calls: train, test, convert, benchmark, demo."""
