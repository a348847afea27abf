"""Whether this process is one of several ranks that must meet in collectives. Source: ours."""

from __future__ import annotations

import torch.distributed as dist


def has_process_group() -> bool:
    """Whether torch.distributed is initialised, so that sums have to be taken over ranks."""
    return dist.is_available() and dist.is_initialized()
