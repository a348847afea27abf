"""Domain specialisation of experts: which share of the tokens of each domain visits an expert.

    DS(d, e) = tokens of domain d that visit expert e / tokens of domain d

K/E throughout means that the domain does not matter. Letters: D domains, K experts per token, E routed experts.
Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060).
"""

from __future__ import annotations

from torch import Tensor


def domain_specialization(load: Tensor, num_tokens: Tensor) -> Tensor:
    """DS from counts: load (D, E) and the tokens of each domain (D,) -> (D, E) float64 in [0, 1], rows sum to K.

    load: `expert_load` of each domain. A domain without tokens is a row of NaN.
    """
    if load.ndim != 2 or num_tokens.shape != load.shape[:1]:
        raise ValueError(
            f"load is {tuple(load.shape)} and num_tokens {tuple(num_tokens.shape)}: they must be (D, E) and (D,)."
        )
    return load.double() / num_tokens.double()[:, None]
