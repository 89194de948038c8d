"""What makes a CPU faster and changes no result but in its last digits."""
import ctypes
import platform

import torch.nn as nn
import torch.nn.functional as F

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


class Linear(nn.Linear):
    """nn.Linear; over at least 16 rows of 16 steps, on a CPU, as a 1 x 1 convolution.

    PERF: torch gives matrix products to MKL, which leaves AVX-512 alone on AMD's processors, but convolutions (one thread:
    of 16 images and more) to oneDNN. On a Zen 5 1.8 times as fast, gradients included; an update of GPT 1.3 times.
    """

    def forward(self, x):                                               # [B, T, in] -> [B, T, out]
        if x.device.type != "cpu" or min(x.shape[:2]) < 16:
            return super().forward(x)
        columns = x.unsqueeze(1).permute(0, 3, 1, 2)                    # [B, in, 1, T], in memory as they were
        return F.conv2d(columns, self.weight[..., None, None], self.bias).permute(0, 2, 3, 1).squeeze(1)
