"""AdamW for bfloat16 weights: what is smaller than the distance of two numbers arrives in the mean of many steps.

A bfloat16 number has 8 significant bits. Rounded to the nearest, w + d is w for every |d| below |w| / 512 or so, and
at the learning rates of continued training that is most of all updates. Rounded at random no update is lost:

    x, between its neighbours a < b, becomes b with probability (x - a) / (b - a), else a

whose mean is x. One step t of a weight w with gradient g is computed in float32 and rounded once:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

The moments are bfloat16 too and rounded in the same way: to the nearest, a v with b2 = 0.999 would never fall again,
since a thousandth of it is less than half a distance. 6 bytes a parameter beside its gradient, where float32 weights
take 12. float32 weights among them get float32 moments and are not rounded.

With `bits=8` a moment takes a byte, 4 a parameter in all, and a block of 4,096 elements an exponent. A byte holds the
uppermost bits of x / 2^c as a float32, c such that the largest of the block just fits: of m a sign, 4 bits of exponent
and 3 of mantissa; of v, which has no sign, 5 and 3. As in every float the smallest numbers are evenly spaced, so what
is below them becomes one of two neighbours at random, like all others; but v never becomes 0, which would divide by
eps. Small tensors and shards of FSDP2 keep bfloat16.

The random bits are a function of (seed, step, place of the parameter, element): a resumed run takes those that an
uninterrupted one would have taken, and copies of a weight on several ranks stay equal. Four elements share one counter
of Philox: 16 bits of a word go to the weight, 8 to each moment, whose other 8 bits are a half.

Letters: w weight, g gradient, m and v first and second moment, b1 and b2 their coefficients, decay weight decay.
Source: AdamW, arXiv 1711.05101; random rounding in training, arXiv 1502.02551 and, of bfloat16 weights, 2010.06192;
Philox, Salmon et al. 2011, 10 rounds of four 32-bit words, the same as Triton's; moments of 8 bits by blocks, arXiv
2110.02861. The kernel and the byte are ours.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


# Whether Triton runs kernels on the CPU, one operation after the other; read once, as Triton's decorators do.
IS_INTERPRETED: bool = triton.knobs.runtime.interpret
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SPAN = 1024  # elements that take the same word of their counters; a program has four spans
ALIGNMENT = 16  # bytes that a thread reads at once; also a number of elements that needs no mask within these
SIGNED, UNSIGNED = 15, 31  # exponent, as a float32 stores it, of the largest number of a byte with and without sign
MAX_EXPONENT = 126 + SIGNED  # of what is divided, so that 2^-c is no denormal number
_WORD = 0xFFFFFFFF


class TensorStep(NamedTuple):
    """The step of one tensor. place, shard: what its random bits depend on besides seed and step; shard is the
    position of its first element in the whole tensor, modulo 2^32."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exponents: tuple[Tensor, Tensor] | None  # (blocks,) uint8 each, of moments in bytes
    step: int
    place: int
    shard: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def factors(self) -> tuple[float, ...]:
        """b1, 1 - b1, b2, 1 - b2, eps, 1 - lr decay, lr / (1 - b1^t), 1 / sqrt(1 - b2^t)."""
        (beta1, beta2), step = self.betas, self.step
        corrections = self.lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        return beta1, 1 - beta1, beta2, 1 - beta2, self.eps, 1 - self.lr * self.weight_decay, *corrections


class StochasticAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for weights in bfloat16, which learn as if they were in float32. See the head of the file.

    One launch for all tensors of a type on a GPU; on the CPU the definition, `plain_adamw_step`. Weights may be shards
    of FSDP2. State: `step`, `exp_avg` and `exp_avg_sq`, as torch's, and of moments in bytes `exponent`, `exponent_sq`.

    bits: 16 or 8, of a moment of a bfloat16 weight. seed: of the rounding; kept in the state, so that a resumed run
    goes on with the same. Raises ValueError for settings out of range and for weights that are neither bfloat16 nor
    float32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
        bits: int = 16,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number, at least 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1).")
        if bits not in (8, 16):
            raise ValueError(f"bits={bits} of a moment: choose 8 or 16.")
        self._shards: dict[Tensor, int] = {}
        self.grad_scale: Tensor | None = None  # () float32: the next step multiplies gradients by it
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed, "bits": bits}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses weights of another type."""
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.dtype not in TRITON_DTYPES:
                raise ValueError(
                    f"StochasticAdamW trains bfloat16 and float32 weights, got {weight.dtype}: load the model as one "
                    "of these, or take torch.optim.AdamW."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shards, self.grad_scale = {}, None
        for values in self.state.values():  # a checkpoint that was read onto the device brings its counts along
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].cpu()
            for name in ("exp_avg", "exp_avg_sq", "exponent", "exponent_sq") if "exponent" in values else ():
                values[name] = values[name].to(torch.uint8)  # torch loads a state in the type of its weight
        for group in self.param_groups:
            group.setdefault("bits", 16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every weight that has a gradient. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: dict[Any, list[TensorStep]] = defaultdict(list)
        place = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and _local(param).numel():
                    work = self._step_of(param, group, place)
                    together[_launch_of(work), group["seed"]].append(work)
                place += 1
        scale, self.grad_scale = self.grad_scale, None
        for (launch, seed), steps in together.items():
            if launch is None:
                for work in steps:
                    plain_adamw_step(work, seed, scale)
            else:
                launch_adamw(steps, seed, launch[-1], scale)
        return loss

    def _step_of(self, param: Tensor, group: dict[str, Any], place: int) -> TensorStep:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            in_bytes = group["bits"] == 8 and param.dtype == torch.bfloat16 and not isinstance(param, DTensor)
            in_bytes = in_bytes and param.numel() >= 4 * SPAN and param.is_contiguous()
            dtype = torch.uint8 if in_bytes else param.dtype
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(param, dtype=dtype) for _ in range(2))
            for name in ("exponent", "exponent_sq") if in_bytes else ():
                state[name] = param.new_zeros(-(-param.numel() // (4 * SPAN)), dtype=torch.uint8)
        state["step"] += 1
        if param not in self._shards:
            self._shards[param] = _first_element(param)
        tensors = (_local(tensor) for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        exponents = (state["exponent"], state["exponent_sq"]) if "exponent" in state else None
        settings = (float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        return TensorStep(*tensors, exponents, int(state["step"]), place, self._shards[param], *settings)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_element(param: Tensor) -> int:
    """Position of the first element of a rank's part in the whole tensor, modulo 2^32; 0 of a tensor that is whole."""
    if not isinstance(param, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return sum(offset * stride for offset, stride in zip(offsets, param.stride(), strict=True)) & _WORD


def _launch_of(work: TensorStep) -> tuple[torch.dtype, torch.device, bool, bool] | None:
    """What tensors of one launch have in common: type, device, bytes, alignment; None for those that torch steps."""
    tensors = work[:4]
    if not (work.weight.is_cuda or IS_INTERPRETED) or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    is_aligned = not any(number % ALIGNMENT for number in (work.weight.numel(), *(t.data_ptr() for t in tensors)))
    return work.weight.dtype, work.weight.device, work.exponents is not None, is_aligned


# ---- the definition ----


def plain_philox(counter: Tensor, others: tuple[int, int, int], seed: int) -> Tensor:
    """Four random words (4, N), int64 in [0, 2^32), of counters (N,) in the same range.

    others: the other three words of the counter. seed: 64 bits, the key.
    """
    c0, c1, c2, c3 = counter, *(torch.full_like(counter, other) for other in others)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits, of which the uppermost is the sign
        c0, c1 = (second >> 32) & _WORD ^ c1 ^ key0, second & _WORD
        c2, c3 = (first >> 32) & _WORD ^ c3 ^ key1, first & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return torch.stack([c0, c1, c2, c3])


def plain_words(numel: int, place: int, step: int, shard: int, seed: int, device: torch.device) -> Tensor:
    """The random word (numel,) of every element of a tensor: word j of a counter goes to the j-th of four spans."""
    num_blocks = -(-numel // (4 * SPAN))
    words = plain_philox(torch.arange(num_blocks * SPAN, device=device), (place, step, shard), seed)
    return words.view(4, num_blocks, SPAN).transpose(0, 1).flatten()[:numel]


def plain_round(values: Tensor, noise: Tensor) -> Tensor:
    """float32 values as bfloat16, rounded away from zero where noise, in [0, 2^16), carries what is cut off."""
    bits = (values.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


def plain_decode(codes: Tensor, exponent: Tensor, top: int) -> Tensor:
    """The float32 numbers of bytes (N,). exponent: (blocks,). top: `SIGNED` or `UNSIGNED`."""
    codes, largest = codes.to(torch.int32), 8 * top + 7
    factor = (exponent.to(torch.int32) + 127 - top << 23).view(torch.float32)
    values = (codes & largest) << 20 | (codes & ~largest) << 24
    return values.view(torch.float32) * factor.repeat_interleave(4 * SPAN)[: codes.numel()]


def plain_encode(values: Tensor, noise: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Bytes (N,) of float32 values (N,), rounded by noise in [0, 256), and the exponent of each block."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % (4 * SPAN))).view(-1, 4 * SPAN)
    exponent = (blocks.abs().amax(1).view(torch.int32) + 0xFFFFF >> 23).clamp(max=MAX_EXPONENT)
    scaled = blocks * (127 + top - exponent << 23).view(torch.float32)[:, None]
    size = scaled.abs().flatten()[: values.numel()].view(torch.int32) + (noise.to(torch.int32) << 12) + 2048
    codes = (size >> 20).clamp(0 if top == SIGNED else 1, 8 * top + 7) + 128 * (values < 0)
    return codes.to(torch.uint8), exponent.to(torch.uint8)


def plain_adamw_step(work: TensorStep, seed: int, scale: Tensor | None = None) -> None:
    """The definition of a step, in place. scale: () what the gradient is multiplied by, 1 for None."""
    beta1, rest1, beta2, rest2, eps, kept, step_size, correction = work.factors()
    grad = work.grad.float() if scale is None else work.grad.float() * scale.to(work.grad.device)
    exp_avg, exp_avg_sq = work.exp_avg.float(), work.exp_avg_sq.float()
    if work.exponents is not None:
        moments = zip((work.exp_avg, work.exp_avg_sq), work.exponents, (SIGNED, UNSIGNED), strict=True)
        exp_avg, exp_avg_sq = (plain_decode(m.flatten(), at, top).view(m.shape) for m, at, top in moments)
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    weight = kept * work.weight.float() - step_size * exp_avg / (exp_avg_sq.sqrt() * correction + eps)
    if work.weight.dtype == torch.bfloat16:
        words = plain_words(grad.numel(), work.place, work.step, work.shard, seed, grad.device).view(grad.shape)
        weight = plain_round(weight, words >> 16)
        noise, noise_sq = words >> 8 & 0xFF, words & 0xFF
        if work.exponents is None:
            exp_avg, exp_avg_sq = (
                plain_round(exp_avg, (noise << 8) + 128), plain_round(exp_avg_sq, (noise_sq << 8) + 128)
            )  # fmt: skip
        else:
            exp_avg, exponent = plain_encode(exp_avg.flatten(), noise.flatten(), SIGNED)
            exp_avg_sq, exponent_sq = plain_encode(exp_avg_sq.flatten(), noise_sq.flatten(), UNSIGNED)
            exp_avg, exp_avg_sq = exp_avg.view(grad.shape), exp_avg_sq.view(grad.shape)
            work.exponents[0].copy_(exponent)
            work.exponents[1].copy_(exponent_sq)
    for old, new in ((work.weight, weight), (work.exp_avg, exp_avg), (work.exp_avg_sq, exp_avg_sq)):
        old.copy_(new)


# ---- the kernel ----


@triton.jit
def _round(values, noise):
    """float32 values with the bits that bfloat16 has, rounded away from zero where the noise carries."""
    bits = (values.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)


@triton.jit
def _decode(codes, exponent, TOP: tl.constexpr):
    """`plain_decode` of a span."""
    codes = codes.to(tl.int32)
    LARGEST: tl.constexpr = 8 * TOP + 7
    values = (codes & LARGEST) << 20
    if TOP == 15:
        values |= (codes & 128) << 24
    return values.to(tl.float32, bitcast=True) * ((exponent + 127 - TOP) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode(values, exponent, noise, TOP: tl.constexpr):
    """The bytes of `plain_encode` of a span. noise: its bits 12 to 19 count."""
    scaled = (values * ((127 + TOP - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    size = (scaled & 0x7FFFFFFF) + ((noise & 0xFF000) | 2048).to(tl.int32)
    codes = tl.minimum(size >> 20, 8 * TOP + 7)
    if TOP == 15:
        codes |= (scaled >> 24) & 128
    else:
        codes = tl.maximum(codes, 1)
    return codes.to(tl.uint8)


@triton.jit
def _exponent(a, b, c, d, MAX_EXPONENT: tl.constexpr):
    """That of `plain_encode` of a block of four spans."""
    largest = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    return tl.minimum((tl.max(largest, 0).to(tl.int32, bitcast=True) + 0xFFFFF) >> 23, MAX_EXPONENT)


@triton.jit
def _update(
    pointers, exponents, scale, factors, elements, numel, words, ROUNDED: tl.constexpr, IN_BYTES: tl.constexpr
):  # fmt: skip
    """Step the weights of a span of elements, whose random words are `words`; returns its new moments in float32."""
    weight_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr = pointers
    keep = elements < numel
    weight = tl.load(weight_ptr + elements, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + elements, mask=keep, other=0.0).to(tl.float32) * scale
    exp_avg = tl.load(exp_avg_ptr + elements, mask=keep, other=0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + elements, mask=keep, other=0)
    beta1, rest1, beta2, rest2, eps, kept, step_size, correction = factors
    if IN_BYTES:
        exponent, exponent_sq = exponents
        exp_avg, exp_avg_sq = _decode(exp_avg, exponent, 15), _decode(exp_avg_sq, exponent_sq, 31)
    exp_avg = beta1 * exp_avg.to(tl.float32) + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq.to(tl.float32) + rest2 * grad * grad
    weight = kept * weight - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * correction + eps)
    if ROUNDED:
        weight = _round(weight, words >> 16)
    tl.store(weight_ptr + elements, weight.to(weight_ptr.dtype.element_ty), mask=keep)
    if IN_BYTES:  # what is outside must not be the largest
        return tl.where(keep, exp_avg, 0.0), tl.where(keep, exp_avg_sq, 0.0)
    return exp_avg, exp_avg_sq


@triton.jit
def _store(
    pointers, exponents, exp_avg, exp_avg_sq, elements, numel, words, ROUNDED: tl.constexpr, IN_BYTES: tl.constexpr
):  # fmt: skip
    """Round the moments of a span and write them."""
    _, _, exp_avg_ptr, exp_avg_sq_ptr = pointers
    keep = elements < numel
    if IN_BYTES:
        exponent, exponent_sq = exponents
        exp_avg = _encode(exp_avg, exponent, words << 4, 15)
        exp_avg_sq = _encode(exp_avg_sq, exponent_sq, words << 12, 31)
    elif ROUNDED:
        exp_avg = _round(exp_avg, (words & 0xFF00) + 128)
        exp_avg_sq = _round(exp_avg_sq, ((words & 0xFF) << 8) + 128)
    tl.store(exp_avg_ptr + elements, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=keep)
    tl.store(exp_avg_sq_ptr + elements, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _step(pointers, exponents, scale, factors, elements, numel, words, ROUNDED: tl.constexpr):
    """The whole step of a span whose moments are no bytes."""
    exp_avg, exp_avg_sq = _update(pointers, exponents, scale, factors, elements, numel, words, ROUNDED, False)
    _store(pointers, exponents, exp_avg, exp_avg_sq, elements, numel, words, ROUNDED, False)


@triton.jit
def _pointer(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    blocks_ptr, tensors_ptr, factors_ptr, scale_ptr, seed,
    DTYPE: tl.constexpr, ROUNDED: tl.constexpr, IN_BYTES: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
):  # fmt: skip
    """A step of many tensors. Grid (blocks,): a program has four spans of one tensor.

    blocks (blocks, 2) int32: the tensor and which of its blocks. tensors (tensors, 10) int64: addresses of weight,
    gradient and both moments, number of elements, place, step, shard, addresses of both exponents. factors
    (tensors, 8) float32. scale () float32.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program).to(tl.int64)
    block = tl.load(blocks_ptr + 2 * program + 1)
    row, scalars = tensors_ptr + 10 * tensor, factors_ptr + 8 * tensor
    MOMENT: tl.constexpr = tl.uint8 if IN_BYTES else DTYPE
    weight = _pointer(row, DTYPE, ALIGNED)
    grad = _pointer(row + 1, DTYPE, ALIGNED)
    exp_avg = _pointer(row + 2, MOMENT, ALIGNED)
    exp_avg_sq = _pointer(row + 3, MOMENT, ALIGNED)
    numel = tl.load(row + 4)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    factors = (
        tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3),
        tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6), tl.load(scalars + 7),
    )  # fmt: skip
    counter = (block * SPAN + tl.arange(0, SPAN)).to(tl.uint32)
    zeros = counter * 0
    a, b, c, d = zeros, zeros, zeros, zeros
    if ROUNDED:
        place = tl.load(row + 5).to(tl.uint32)
        step = tl.load(row + 6).to(tl.uint32)
        shard = tl.load(row + 7).to(tl.uint32)
        a, b, c, d = tl.philox(seed, counter, zeros + place, zeros + step, zeros + shard)
    scale = tl.load(scale_ptr)
    elements = block.to(tl.int64) * (4 * SPAN) + tl.arange(0, SPAN)
    pointers, first = (weight, grad, exp_avg, exp_avg_sq), elements
    second, third, fourth = elements + SPAN, elements + 2 * SPAN, elements + 3 * SPAN
    exponents = (0, 0)
    if IN_BYTES:
        of_moment = tl.load(row + 8).to(tl.pointer_type(tl.uint8)) + block
        of_square = tl.load(row + 9).to(tl.pointer_type(tl.uint8)) + block
        exponents = (tl.load(of_moment).to(tl.int32), tl.load(of_square).to(tl.int32))
    if IN_BYTES:  # an exponent is of the whole block
        ma, va = _update(pointers, exponents, scale, factors, first, numel, a, ROUNDED, IN_BYTES)
        mb, vb = _update(pointers, exponents, scale, factors, second, numel, b, ROUNDED, IN_BYTES)
        mc, vc = _update(pointers, exponents, scale, factors, third, numel, c, ROUNDED, IN_BYTES)
        md, vd = _update(pointers, exponents, scale, factors, fourth, numel, d, ROUNDED, IN_BYTES)
        exponents = (_exponent(ma, mb, mc, md, MAX_EXPONENT), _exponent(va, vb, vc, vd, MAX_EXPONENT))
        tl.store(of_moment, exponents[0].to(tl.uint8))
        tl.store(of_square, exponents[1].to(tl.uint8))
        _store(pointers, exponents, ma, va, first, numel, a, ROUNDED, IN_BYTES)
        _store(pointers, exponents, mb, vb, second, numel, b, ROUNDED, IN_BYTES)
        _store(pointers, exponents, mc, vc, third, numel, c, ROUNDED, IN_BYTES)
        _store(pointers, exponents, md, vd, fourth, numel, d, ROUNDED, IN_BYTES)
    else:  # a span at a time, which keeps fewer numbers at hand
        _step(pointers, exponents, scale, factors, first, numel, a, ROUNDED)
        _step(pointers, exponents, scale, factors, second, numel, b, ROUNDED)
        _step(pointers, exponents, scale, factors, third, numel, c, ROUNDED)
        _step(pointers, exponents, scale, factors, fourth, numel, d, ROUNDED)


@functools.lru_cache(maxsize=8)  # a run steps the same tensors every time
def _blocks_of(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """(blocks, 2) int32: tensor and block of every program."""
    counts = torch.tensor([-(-numel // (4 * SPAN)) for numel in numels])
    tensors = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensors, torch.arange(len(tensors)) - first], dim=1).to(torch.int32).to(device)


@functools.lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def launch_adamw(steps: list[TensorStep], seed: int, aligned: bool, scale: Tensor | None = None) -> None:
    """`plain_adamw_step` of many contiguous tensors of one type on one device, in one launch.

    aligned: whether all addresses and numbers of elements are multiples of ALIGNMENT.
    """
    device, dtype = steps[0].weight.device, steps[0].weight.dtype
    rows = [
        [*(t.data_ptr() for t in s[:4]), s.weight.numel(), s.place, s.step, s.shard]
        + [t.data_ptr() for t in s.exponents or s[2:4]]
        for s in steps
    ]
    tensors, factors = torch.tensor(rows), torch.tensor([s.factors() for s in steps], dtype=torch.float32)
    if device.type == "cuda":
        tensors, factors = (table.pin_memory().to(device, non_blocking=True) for table in (tensors, factors))
    blocks = _blocks_of(tuple(s.weight.numel() for s in steps), device)
    with torch.cuda.device_of(steps[0].weight):
        _adamw_kernel[(len(blocks),)](
            blocks, tensors, factors, _one(device) if scale is None else scale.float().to(device), seed,
            DTYPE=TRITON_DTYPES[dtype], ROUNDED=dtype == torch.bfloat16, IN_BYTES=steps[0].exponents is not None,
            ALIGNED=aligned, SPAN=SPAN, MAX_EXPONENT=MAX_EXPONENT,
        )  # fmt: skip
