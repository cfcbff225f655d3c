"""File locks that end when the file is closed, as at the end of the process and of its forks."""

try:
    import fcntl
except ImportError:  # not on Windows, where an open file cannot be removed anyway
    fcntl = None


def lock(file) -> None:
    """Lock a file until it is closed here and in all processes forked since. Does nothing on Windows.

    Args:
        file: an open file, or the descriptor of one or of a folder.

    Raises:
        BlockingIOError: if another process holds the lock.
        OSError: for a file system without locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
