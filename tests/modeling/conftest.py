"""Models on the meta device stay there although tests replace `torch.empty` (tests/helpers/fresh_memory.py)."""

from torch.utils import _device


# `with torch.device(...)` recognises torch's own allocators by identity and remembers them at its first use: let that
# be now, before any is replaced, or the full-size presets would be allocated in memory.
_device._device_constructors()
