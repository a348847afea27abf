"""Random routings, and traces made of them, for tests of routing metrics."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from hf_moe_cpt.routing.trace import RoutingTrace, TraceDescription, TraceLayer, TraceWriter


def random_routing(tokens: int, num_experts: int, k: int, seed: int = 0) -> torch.Tensor:
    """(T, K) with distinct experts per token."""
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k, dim=-1).indices


@st.composite
def routings(draw, least_k: int = 1):
    """(top_k_index (T, K), num_experts)."""
    num_experts = draw(st.integers(least_k, 12))
    k = draw(st.integers(least_k, num_experts))
    return random_routing(draw(st.integers(1, 40)), num_experts, k, draw(st.integers(0, 999))), num_experts


def random_trace(
    folder: Path,
    shape: tuple[tuple[int, int], ...] = ((5, 2), (5, 2)),
    domains: tuple[tuple[str, int], ...] = (("prose", 30), ("prose", 20), ("code", 25)),
    vocab_size: int = 9,
    seed: int = 0,
    probabilities: bool = True,
    tokenizer: str | None = None,
    text_seed: int = 7,
) -> RoutingTrace:
    """A trace of layers (E, K) over shards (domain, T); its text depends on text_seed alone."""
    layers = tuple(TraceLayer(f"layers.{at}.experts", e, k) for at, (e, k) in enumerate(shape))
    writer = TraceWriter(
        folder, TraceDescription(f"random {seed}", seed, layers, vocab_size, tokenizer, probabilities, {})
    )
    writer.begin()
    for number, (domain, tokens) in enumerate(domains):
        ids = np.random.default_rng((text_seed, number)).integers(0, vocab_size, tokens).astype(np.int32)
        arrays = {"token_ids": ids, "next_token_ids": np.append(ids[1:], np.int32(-1))}
        for place, (e, k) in enumerate(shape):
            logits = torch.randn(tokens, e, generator=torch.Generator().manual_seed(1000 * seed + 10 * number + place))
            probs, index = logits.softmax(-1).topk(k)
            arrays[f"layer_{place:03d}.experts"] = index.numpy().astype(np.uint8 if e <= 256 else np.uint16)
            if probabilities:
                arrays[f"layer_{place:03d}.probabilities"] = probs.half().numpy()
                entropy = torch.special.entr(logits.softmax(-1)).sum(-1) / np.log(e)
                arrays[f"layer_{place:03d}.entropy"] = entropy.half().numpy()
        writer.write(number, domain, arrays)
    return writer.finish(len(domains))
