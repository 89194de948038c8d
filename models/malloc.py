"""What the C library does with the memory of freed tensors."""
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory():
    """Keep the memory of freed tensors for the next ones; with another C library than glibc, do nothing.

    PERF: glibc gives what large tensors held back to the system and fetches it again, page by page: on a CPU a fifth of an
    update on 64 whole episodes of 250 steps. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)                                # bytes: no tensor below it is mapped apart
