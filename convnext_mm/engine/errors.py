"""What a user can get wrong in a config or on a command line."""


class ConfigError(ValueError):
    """A setting or path is wrong; the message says which and what to do."""
