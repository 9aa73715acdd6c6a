"""The memory that the process frees."""

import ctypes

# Parameters of `mallopt`, and the value of its second: the largest.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
NEVER = 2**31 - 1

_is_kept = False


def keep_freed_memory():
    """Lets the process keep the memory of freed tensors for new ones (Linux).

    The GNU C library returns the memory of a large tensor to the operating system when
    it is freed, and gets that of a new one page by page, each filled with zeros first.
    For tensors on a CPU that can take a large part of a training step. After this call,
    the process keeps the memory that it once had, so its size stays at its peak.

    Call it once, before the first tensor is created.

    Returns:
        bool, whether the process keeps its memory: `False` with another C library, as
        on macOS and Windows, where nothing changes.

    Example:

    ```python
    keras_moe.keep_freed_memory()
    ```
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # None, and no name at all on Windows.
        return False
    # Nothing is mapped by itself, and the end of the heap is not trimmed.
    options = (MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER)
    global _is_kept
    _is_kept = all(set_option(*option) == 1 for option in options)
    return _is_kept


def is_kept():
    """Returns whether the process keeps freed memory."""
    return _is_kept
