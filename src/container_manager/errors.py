"""What goes wrong, as its user reads it."""


class ContainerError(Exception):
    """An error whose text a user reads on stderr after `error: `; the exit status is 1.

    Args:
        message: what is wrong and where.
        remedy: what to do, ideally a command.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n→ {remedy}" if remedy else message)


class Refusal(ContainerError):
    """A refusal in words that people know by heart: it stands on stderr as it is; the exit status is 1."""


class NoRoomError(ContainerError):
    """No machine has room for a container."""
