"""What routers do: hooks that find them in any model, metrics, traces, comparison of checkpoints, a report."""

from typing import TYPE_CHECKING

from hf_moe_cpt import lazy_names


if TYPE_CHECKING:
    from hf_moe_cpt.routing.compare import *  # noqa: F403
    from hf_moe_cpt.routing.hooks import *  # noqa: F403
    from hf_moe_cpt.routing.metrics import *  # noqa: F403
    from hf_moe_cpt.routing.report import *  # noqa: F403
    from hf_moe_cpt.routing.trace import *  # noqa: F403

_NAMES = {
    "hf_moe_cpt.routing.compare": ("analyse_traces",),
    "hf_moe_cpt.routing.hooks": ("MoeLayer", "moe_layers"),
    "hf_moe_cpt.routing.metrics": (
        "CoactivationCounter",
        "ContinualOutcome",
        "ImbalanceShift",
        "SaturationCounter",
        "VocabularyCounter",
        "adaptation",
        "coactivation_change",
        "contiguous_placement",
        "dead_experts",
        "domain_specialization",
        "estimate_placement",
        "expert_coactivation",
        "expert_load",
        "favourite_experts",
        "forgetting",
        "imbalance_around_shift",
        "imbalance_curve",
        "load_cv",
        "load_entropy",
        "max_routing_imbalance",
        "max_routing_imbalance_from_load",
        "normalized_imbalance",
        "recovery_step",
        "router_confidence",
        "router_entropy",
        "router_saturation",
        "suggested_placement",
        "vocabulary_specialization",
        "vocabulary_specialization_from_counts",
    ),
    "hf_moe_cpt.routing.report": ("write_routing_report",),
    "hf_moe_cpt.routing.trace": ("RoutingTrace", "TraceDescription", "TraceLayer", "TraceWriter", "collect_routing"),
}
__all__ = [name for names in _NAMES.values() for name in names]
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
