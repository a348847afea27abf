"""Expert parallelism in which a token travels once to each rank that holds one of its experts, not once per expert.

    AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(
        fsdp_size=8, ep_size=8, ep_implementation="hf_moe_cpt"))

transformers deals the experts, makes the meshes and shards the rest (FSDP2); this is what happens between router and
experts. Rows travel in the type of the products; with a row go the K local ids of its experts, a sentinel for those of
other ranks, and its K gates, which the experts' own kernel applies. Sums over copies are taken in float32, in an order
that does not change. Gathering copies and adding them up are each other's backward, so nothing is kept but places.

T tokens of this rank, K experts per token, N ranks that share the experts, C experts on each, S copies this rank
sends, R rows that come, H hidden size. Importing the file registers "hf_moe_cpt" in `EPImplementationInterface`, where
transformers (5.23 or newer) has it. Source: ours; that a token goes to a rank once is usual in DeepEP and its like.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_moe_cpt.kernels.experts_interface import HAS_TRITON


try:
    from transformers.distributed.expert_parallel import AutoEP, EPImplementationInterface
except ImportError:  # transformers before 5.23; who asks for expert parallelism is told so in arguments.py
    AutoEP, EPImplementationInterface = object, None

_Way = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

NAME = "hf_moe_cpt"
MOST_SPARED = 0.2  # share of the copies that are not needed, up to which all tokens go to all ranks
SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_mlp")  # as transformers' models call them
_INTEGER_OF = {4: torch.int32, 8: torch.int64}  # an integer that a float of so many bytes carries


def plain_expert_parallel(
    tokens: Sequence[Tensor],
    index: Sequence[Tensor],
    gates: Sequence[Tensor],
    run_experts: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    num_local: int,
) -> list[Tensor]:
    """The definition of the exchange, all N ranks in one process: (T_n, H) for each rank n.

    tokens, index, gates: of each rank (T_n, H), (T_n, K), (T_n, K). run_experts(rank, rows, ids, gates): the experts
    rank x C to rank x C + C - 1 on rows (R, H), local ids (R, K) with C for none, and gates (R, K).
    """
    outputs = [torch.zeros_like(mine) for mine in tokens]
    for rank in range(len(tokens)):
        for output, mine, chosen, gate in zip(outputs, tokens, index, gates, strict=True):
            is_here = chosen // num_local == rank
            travels = is_here.any(1).nonzero()[:, 0]
            ids = torch.where(is_here, chosen % num_local, num_local)[travels]
            if travels.numel():
                done = run_experts(rank, mine[travels], ids, gate.where(is_here, 0.0)[travels])
                output.index_add_(0, travels, done)
    return outputs


class _Transfer:
    """Rows to other ranks in two halves, (..., C) -> (..., C); gradients go back alike.

    What is called between `begin` and `end` runs beside the transfer, and so does its backward pass. there, back: what
    sends rows, and what makes of those that came what is asked for.
    """

    def __init__(self, there: _Way, back: _Way, is_kept: bool = True) -> None:
        self.there, self.back, self.is_kept = there, back, is_kept
        self.gradient: Tensor | None = None  # on its way

    def begin(self, rows: Tensor) -> Tensor:
        """Rows of other ranks, which are not there before `end`."""
        return _Begin.apply(rows, self)

    def end(self, rows: Tensor) -> Tensor:
        """The rows that `begin` returned, when they are there."""
        return _End.apply(rows, self)


class _Begin(torch.autograd.Function):
    """Sends rows; backward: gradients are there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return _once(transfer.there[0], rows.contiguous(), transfer.is_kept)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.transfer.gradient = ctx.transfer.gradient, None
        return ctx.transfer.back[1](_wait(gradient)), None


class _End(torch.autograd.Function):
    """Rows are there; backward: sends gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer, ctx.shape = transfer, rows.shape
        return transfer.there[1](_wait(rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.gradient = ctx.transfer.back[0](grad.contiguous())
        # of the shape that is asked for; `_Begin` hands out the one that travels
        return grad.new_empty(()).expand(ctx.shape), None


class _Copies(torch.autograd.Function):
    """Copies of tokens (T, C) -> (S, C), or, with `adds`, copies added up (S, C) -> (T, C): adjoints.

    Places are no saved tensors on purpose: recomputation of a layer ends at the last of these, before the way back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, places: Tensor, adds: bool) -> Tensor:
        ctx.places = token, places, adds
        return _add_up(rows, places) if adds else rows[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        token, places, adds = ctx.places
        return (grad[token] if adds else _add_up(grad, places)), None, None, None


def _add_up(rows: Tensor, places: Tensor) -> Tensor:
    """The copies of each token added in at least float32; places (T, N): row of a copy, -1 for none."""
    if rows.is_cuda and HAS_TRITON and places.numel() and rows.element_size() <= 4:  # it adds in float32
        from hf_moe_cpt.kernels.routing import combine_rows

        with torch.cuda.device_of(rows):
            return combine_rows(rows, places.view(-1), None, places.shape[1])
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # the last, which -1 means
    total = rows[places[:, 0]].to(torch.promote_types(rows.dtype, torch.float32))
    for place in places.T[1:]:
        total += rows[place]
    return total.to(rows.dtype)


def _once(send: Callable[[Tensor], Tensor], rows: Tensor, is_kept: bool = True) -> Tensor:
    """What comes for rows, not there before `_wait`; what `keep_exchanges` kept is not sent again."""
    kept = _kept.get() if is_kept else None
    if kept is not None and kept.is_replayed:
        return kept.rows.popleft()
    found = send(rows)
    if kept is not None:
        kept.rows.append(found.detach())
    return found


def _to_each(send: list[int], receive: list[int], group_name: str) -> _Way:
    """So many rows to each rank, so many from each."""
    return lambda rows: torch.ops._c10d_functional.all_to_all_single(rows, receive, send, group_name), _view


def _view(rows: Tensor) -> Tensor:
    return rows.view_as(rows)


def _to_all(num_ranks: int, group_name: str) -> tuple[_Way, _Way]:
    """All rows to all ranks, (T, C) -> (N T, C), and back the sum of what the ranks made of a row."""

    def sum_up(rows: Tensor) -> Tensor:  # of N tensors of a short type, in float32
        return rows.view(num_ranks, -1, rows.shape[1]).sum(0)

    def to_owners(rows: Tensor) -> Tensor:
        each = [rows.shape[0] // num_ranks] * num_ranks
        return torch.ops._c10d_functional.all_to_all_single(rows, each, each, group_name)

    def gather(rows: Tensor) -> Tensor:
        return torch.ops._c10d_functional.all_gather_into_tensor(rows, num_ranks, group_name)

    return (gather, _view), (to_owners, sum_up)


def _wait(rows: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(rows)


def _labels(gates: Tensor, ids: Tensor) -> Tensor:
    """(T, K) and (T, K) -> (T, 2 K): ids travel as the bits of floats."""
    return torch.cat([gates, ids.to(_INTEGER_OF[gates.element_size()]).view(gates.dtype)], 1)


def _read_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    gates, ids = labels.chunk(2, dim=1)
    return gates, ids.detach().view(_INTEGER_OF[labels.element_size()]).long()


class DeduplicatedEP(AutoEP):
    """transformers' `AutoEP` whose exchange between ranks with different tokens sends no token twice to a rank.

    Overrides `__call__`. Ranks that hold the same tokens, as under tensor parallelism, go the parent's way.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.is_ours = self.megamoe is None and tp_mesh.size() == 1
        self.group_name, self.num_ranks = ep_mesh.get_group().group_name, ep_mesh.size()
        self.beside: Callable[[], None] | None = None  # what can run while rows travel
        self.most_tokens: int | None = None  # of a rank in the pass under way
        self.is_wide = False  # whether most tokens have experts on most ranks
        self.gates: Tensor | None = None  # those of the call under way, before FSDP2 rounds them
        object.__setattr__(experts, "_exchange", self)  # where `overlap_shared_experts` finds it
        self.experts = experts

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output for this rank's tokens: (T, H), (T, K), (T, K) -> (T, H), in the type of the products.

        A collective of the expert group, also without a token. Where most tokens have experts on most ranks, and their
        numbers are known (`tell_numbers_of_tokens`), all go everywhere; else the host waits for numbers of rows.
        """
        if not self.is_ours:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        top_k_weights, self.gates = (top_k_weights if self.gates is None else self.gates), None
        gates = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
        tokens = hidden_states.to(self._wire_dtype(hidden_states))
        kept, most = _kept.get(), self.most_tokens
        if kept is not None:
            most = kept.most_tokens = kept.most_tokens if kept.is_replayed else most
        self.is_wide = (1 - 1 / self.num_ranks) ** top_k_index.shape[1] <= MOST_SPARED
        if most is None or not self.is_wide:
            return self._by_counts(tokens, top_k_index, gates)
        return self._to_all_ranks(tokens, top_k_index, gates, most)

    def _to_all_ranks(self, tokens: Tensor, top_k_index: Tensor, gates: Tensor, most: int) -> Tensor:
        """Every token goes to every rank, with padding of the rank that has the most: the host waits for nothing."""
        num_tokens = tokens.shape[0]
        if missing := most - num_tokens:
            tokens, gates = (F.pad(rows, (0, 0, 0, missing)) for rows in (tokens, gates))
            top_k_index = F.pad(top_k_index, (0, 0, 0, missing), value=self.num_ranks * self.num_local_experts)
        out, home = _to_all(self.num_ranks, self.group_name)
        there, also_there, back = _Transfer(out, home), _Transfer(out, home), _Transfer(home, out, is_kept=False)
        labels, rows = also_there.begin(_labels(gates, top_k_index)), there.begin(tokens)
        if self.beside is not None:
            self.beside()
        gates, index = _read_labels(also_there.end(labels))
        index = index - self.ep_mesh.get_local_rank() * self.num_local_experts
        is_here = (index >= 0) & (index < self.num_local_experts)
        index, gates = index.where(is_here, self.num_local_experts), gates.where(is_here, 0.0)
        done = self.experts_forward(there.end(rows), index, gates)
        done = back.end(back.begin(done.to(tokens.dtype)))
        return done[:num_tokens] if missing else done  # FSDP2 warns of views

    def _by_counts(self, tokens: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        """A token goes to the ranks that need it; the host waits for their numbers."""
        num_tokens, num_chosen = top_k_index.shape
        owner = top_k_index // self.num_local_experts
        ranks = torch.arange(self.num_ranks, device=owner.device)
        is_there = owner[None] == ranks[:, None, None]  # (N, T, K)
        needed = is_there.any(2)
        counts = torch.stack([needed.sum(1), is_there.sum((1, 2))], 1)  # (N, 2): rows, and pairs in them
        each = [1] * self.num_ranks
        coming = _once(_to_each(each, each, self.group_name)[0], counts)

        # what needs no numbers of rows is on its way to the device before the host waits for them
        needed = needed.flatten()
        places = needed.cumsum(0).sub_(1)  # (N T,), of those that are needed
        copy = torch.empty(needed.numel() + 1, dtype=places.dtype, device=places.device)
        copy.scatter_(0, places.where(needed, needed.numel()), torch.arange(places.numel(), device=places.device))
        token, rank = copy % max(num_tokens, 1), copy // max(num_tokens, 1)
        places = places.where(needed, -1).view(self.num_ranks, num_tokens).T.to(torch.int32).contiguous()
        (send, _), (receive, pairs) = torch.stack([counts, _wait(coming)]).transpose(1, 2).tolist()
        out, home = _to_each(send, receive, self.group_name), _to_each(receive, send, self.group_name)
        there, also_there, back = _Transfer(out, home), _Transfer(out, home), _Transfer(home, out, is_kept=False)
        token, rank = token[: sum(send)], rank[: sum(send)]
        is_here = owner[token] == rank[:, None]
        ids = torch.where(is_here, top_k_index[token] % self.num_local_experts, self.num_local_experts)
        gates = _Copies.apply(gates, token, places, False).where(is_here, 0.0)
        labels, rows = also_there.begin(_labels(gates, ids)), there.begin(_Copies.apply(tokens, token, places, False))
        if self.beside is not None:
            self.beside()
        gates, ids = _read_labels(also_there.end(labels))
        done = self._run(there.end(rows), ids, gates, sum(pairs))
        return _Copies.apply(back.end(back.begin(done.to(tokens.dtype))), token, places, True)

    def _run(self, rows: Tensor, ids: Tensor, gates: Tensor, num_pairs: int) -> Tensor:
        """The rank's own experts; without a row they run on one of zeros, so that their weights take part."""
        if rows.shape[0]:
            self.experts._num_pairs = num_pairs  # of R x K, how many an expert of this rank serves
            try:
                return self.experts_forward(rows, ids, gates)
            finally:
                self.experts._num_pairs = None
        row, gate = rows.sum(0, keepdim=True), gates[:, :1].sum(0, keepdim=True)
        return self.experts_forward(row, ids.new_zeros(1, 1), gate)[:0]

    def _wire_dtype(self, hidden_states: Tensor) -> torch.dtype:
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        weight = next(self.experts.parameters(recurse=False), hidden_states)
        return weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else hidden_states.dtype


def tell_numbers_of_tokens(model: nn.Module, most_of: Callable[[int], int]) -> Any:
    """Before each pass that is trained, let exchanges know the tokens of the rank with the most; a hook's handle.

    most_of: of this rank's number that of all ranks, a collective of hosts. It is asked where a token has experts on
    most ranks: with 8 of them on 2 ranks (99.6 % of all copies travel anyway) and on 4 (90 %), not on 8 (66 %).
    """
    exchanges = [part._exchange for part in model.modules() if getattr(part, "_exchange", None) is not None]
    exchanges = [exchange for exchange in exchanges if exchange.is_ours]

    def tell(_: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        ids = given.get("input_ids", args[0] if args else None)
        is_asked = model.training and torch.is_grad_enabled() and ids is not None
        most = most_of(ids.numel()) if is_asked and any(exchange.is_wide for exchange in exchanges) else None
        for exchange in exchanges:
            exchange.most_tokens = most

    return model.register_forward_pre_hook(tell, with_kwargs=True)


def keep_gates(model: nn.Module) -> None:
    """Let gates reach the experts' kernels in the type that the router gave them, as on one device.

    FSDP2 casts everything that a part is called with to the type of its gathered weights.
    """
    for experts in model.modules():
        exchange = getattr(experts, "_exchange", None)
        if exchange is not None and exchange.is_ours:
            experts.register_forward_pre_hook(_remember_gates, prepend=True)


def _remember_gates(experts: nn.Module, args: tuple) -> None:
    experts._exchange.gates = args[2] if len(args) > 2 else None


def overlap_shared_experts(model: nn.Module) -> int:
    """Let shared experts run while tokens travel, in blocks that would call them afterwards; returns how many.

    For models whose experts are dealt by `DeduplicatedEP`. A block that calls its shared experts first loses nothing.
    """
    blocks = 0
    for block in model.modules():
        exchange = getattr(getattr(block, "experts", None), "_exchange", None)
        shared = next(
            (getattr(block, name) for name in SHARED_EXPERTS if getattr(block, name, None) is not None), None
        )
        if exchange is not None and shared is not None and exchange.beside is None:
            _SharedExperts(block, shared, exchange)
            blocks += 1
    return blocks


class _SharedExperts:
    """Runs a block's shared experts on the block's input when its exchange says so, and hands the result out later."""

    def __init__(self, block: nn.Module, shared: nn.Module, exchange: DeduplicatedEP) -> None:
        self.forward, self.given, self.found = shared.forward, None, None
        block.register_forward_pre_hook(self._take)
        block.register_forward_hook(self._forget, always_call=True)
        shared.forward = self._hand_out
        exchange.beside = self._run

    def _take(self, block: nn.Module, args: tuple) -> None:
        self.given, self.found = args[0] if args else None, None

    def _forget(self, *_: Any) -> None:
        self.given = self.found = None

    def _run(self) -> None:
        if self.given is not None:
            self.found = self.forward(self.given)

    def _hand_out(self, hidden_states: Tensor) -> Tensor:
        given, found, self.given = self.given, self.found, None  # called before the experts: no second time
        is_it = found is not None and hidden_states.numel() == given.numel()
        if is_it and hidden_states.data_ptr() == given.data_ptr():
            return found.view(*hidden_states.shape[:-1], found.shape[-1])
        return self.forward(hidden_states)


class _Kept:
    """What came from other ranks in the layers of one checkpoint, in order."""

    def __init__(self) -> None:
        self.rows: deque[Tensor] = deque()
        self.most_tokens: int | None = None
        self.is_replayed = False

    @contextmanager
    def during(self, is_replayed: bool) -> Iterator[None]:
        """Inside, exchanges are kept, or taken from what was kept."""
        self.is_replayed = is_replayed
        before = _kept.set(self)
        try:
            yield
        finally:
            _kept.reset(before)


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


def keep_exchanges() -> tuple[Any, Any]:
    """`context_fn` of torch's checkpointing: a layer that is computed again does not send its tokens again.

    What came from other ranks is kept, R x H; numbers of rows and labels too. The way back is not, since nothing after
    it is needed for gradients in most layers; where something is, it is sent again. torch's own selective
    checkpointing would do it too, but hands every operation to Python.
    """
    kept = _Kept()
    return kept.during(False), kept.during(True)


if EPImplementationInterface is not None:
    EPImplementationInterface.register(NAME, DeduplicatedEP)
