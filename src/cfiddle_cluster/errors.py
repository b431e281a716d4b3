"""What goes wrong, said to a person: what, where, and what to do about it."""


class ClusterError(Exception):
    """An error that a command's user can do something about.

    Args:
        message: what is wrong and where; several lines where that helps.
        remedy: what to do, ideally a command.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n→ {self.remedy}" if self.remedy else self.message
