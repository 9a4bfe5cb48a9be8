"""What becomes of the memory that a call has freed, which can take longer than the call itself.

By default glibc's malloc gives large arrays back to the kernel, which clears them page by page when
the next call wants them again. That is most of the time of a result of 134 MB, it is the same for
everybody, and from 4 to 32 MiB it depends on what was freed before, so that equal calls differ
twofold. Allocators such as jemalloc and tcmalloc, or a training step that XLA holds the memory of,
do not ask the kernel each time.
"""

import ctypes
import platform

import numpy as np

# Parameters of glibc's mallopt, by their numbers in <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1


def keep_freed_memory(in_advance: int) -> bool:
    """Has malloc keep what is freed from now on; False where it is not glibc's.

    Args:
      in_advance: bytes to ask the kernel for now.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    for setting in (
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, _NEVER),
        (_ARENA_MAX, 1),
        (_TOP_PAD, 1 << 28),
    ):
        if not libc.mallopt(*setting):
            return False
    np.ones(in_advance, np.uint8)
    return True
