"""How close two tensors must be, in one table: the relative root-mean-square error by the type that was computed in.

error = rms(got - want) / rms(want), all in float64. Source of the limits: about ten times the rounding of the type.
"""

import torch


RELATIVE_RMS_LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def relative_rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """0 for equal tensors; infinite if the difference is not finite, or if only `want` is zero throughout."""
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}.")
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = (got - want).square().mean().sqrt()
    size = want.square().mean().sqrt()
    if error == 0:
        return 0.0
    if not torch.isfinite(error) or size == 0:
        return float("inf")
    return float(error / size)


def assert_matches(name: str, got: torch.Tensor, want: torch.Tensor, limit: float | None = None) -> None:
    """Fail with the name and the error. limit: the table's for `got`'s dtype if None."""
    limit = RELATIVE_RMS_LIMIT[got.dtype] if limit is None else limit
    error = relative_rms_error(got, want)
    assert error <= limit, f"{name}: relative RMS error {error:.2e} is above {limit:.0e} ({got.dtype})"
