"""Where kernel tests run: on the GPU if there is one, else on the CPU through Triton's interpreter."""

import torch


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bf16 as if it were integers, so bf16 is tested on a real device only.
FLOAT_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
