"""What a user can get wrong in a config or on a command line, and what can go
wrong in training."""


class ConfigError(ValueError):
    """A setting or path is wrong; the message says which and what to do."""


class TrainingError(RuntimeError):
    """Training came to a state from which it cannot go on; the message says which
    and what to do."""
