"""What a user can get wrong in a config or on a command line, what can go wrong in
training, and where any error is explained."""

# The page of the repository that explains errors. A class of ours names its entry
# there, ``anchor``; what else ends a program has the last one.
TROUBLESHOOTING = 'docs/troubleshooting.md'
OTHER = 'other-errors'


def address_of(error: BaseException) -> str:
    """Where an error is explained: the page and the entry on it."""
    return f'{TROUBLESHOOTING}#{getattr(error, "anchor", OTHER)}'


def last_lines(error: BaseException, sentence: str | None = None) -> str:
    """What a program that an error ends says last: one sentence, by default the
    error's own, and where more is said."""
    return f'error: {sentence or error}\nMore: {address_of(error)}'


class ConfigError(ValueError):
    """A setting or path is wrong; the message says which and what to do.

    See ``docs/troubleshooting.md#config-error``."""

    anchor = 'config-error'


class WorkFolderError(ConfigError):
    """The folder of a run holds, or is, another run's.

    See ``docs/troubleshooting.md#a-folder-that-holds-checkpoints``."""

    anchor = 'a-folder-that-holds-checkpoints'


class UnusedParametersError(ConfigError):
    """Parameters that train have no part in the loss.

    See ``docs/troubleshooting.md#parameters-without-gradient``."""

    anchor = 'parameters-without-gradient'


class TrainingError(RuntimeError):
    """Training came to a state from which it cannot go on; the message says which
    and what to do.

    See ``docs/troubleshooting.md#training-error``."""

    anchor = 'training-error'
