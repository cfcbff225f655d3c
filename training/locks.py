"""Locks that end when the file is closed, and so with the process that opened it and those that were forked from it."""

try:
    import fcntl
except ImportError:  # not on Windows, where an open file cannot be removed anyway
    fcntl = None


def lock(file) -> None:
    """Until it is closed here and in all processes that were forked meanwhile, or they end; nothing on Windows.

    Args:
        file: an open file, or the descriptor of one or of a folder.

    Raises:
        BlockingIOError: where another process has it.
        OSError: where the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
