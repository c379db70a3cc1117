"""How glibc's malloc keeps freed memory; elsewhere than on Linux these functions do nothing."""

import ctypes
import sys

# Names of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Keeps freed memory for later allocations instead of returning it to the system."""
    _call("mallopt", _MMAP_MAX, 0)
    _call("mallopt", _TRIM_THRESHOLD, 2**31 - 1)


def use_one_arena() -> None:
    """Lets threads without an arena of their own share one, so that they use its freed memory."""
    _call("mallopt", _ARENA_MAX, 1)


def return_freed() -> None:
    """Returns freed memory to the system; of an arena beside the first, its end is kept."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # other C libraries have none
        if function:
            function(*arguments)
