"""What a router and a model do while the data changes: routing metrics, forgetting, charts and reports."""

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.coactivation import CoactivationCounter, coactivation_change, expert_coactivation
from hf_moe_cpt.analysis.collect_routing import collect_routing
from hf_moe_cpt.analysis.domain_specialization import domain_specialization
from hf_moe_cpt.analysis.expert_parallel import contiguous_placement, estimate_placement, suggested_placement
from hf_moe_cpt.analysis.forgetting import ContinualOutcome, adaptation, forgetting
from hf_moe_cpt.analysis.imbalance_curve import imbalance_curve
from hf_moe_cpt.analysis.load_balance import dead_experts, load_cv
from hf_moe_cpt.analysis.report import Section, write_report
from hf_moe_cpt.analysis.router_certainty import router_confidence, router_entropy
from hf_moe_cpt.analysis.routing import (
    ImbalanceShift,
    expert_load,
    imbalance_around_shift,
    load_entropy,
    max_routing_imbalance,
    max_routing_imbalance_from_load,
    normalized_imbalance,
    recovery_step,
)
from hf_moe_cpt.analysis.routing_report import write_routing_report
from hf_moe_cpt.analysis.routing_trace import RoutingTrace, TraceDescription, TraceLayer
from hf_moe_cpt.analysis.saturation import SaturationCounter, router_saturation
from hf_moe_cpt.analysis.schedule_plot import plot_schedule
from hf_moe_cpt.analysis.trace_analysis import analyse_traces
from hf_moe_cpt.analysis.trace_writer import TraceWriter
from hf_moe_cpt.analysis.vocabulary import (
    VocabularyCounter,
    favourite_experts,
    vocabulary_specialization,
    vocabulary_specialization_from_counts,
)


__all__ = [
    "CoactivationCounter",
    "ContinualOutcome",
    "ImbalanceShift",
    "Mark",
    "RoutingTrace",
    "SaturationCounter",
    "Section",
    "Series",
    "TraceDescription",
    "TraceLayer",
    "TraceWriter",
    "VocabularyCounter",
    "adaptation",
    "analyse_traces",
    "coactivation_change",
    "collect_routing",
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
    "line_chart",
    "load_cv",
    "load_entropy",
    "max_routing_imbalance",
    "max_routing_imbalance_from_load",
    "normalized_imbalance",
    "plot_schedule",
    "recovery_step",
    "router_confidence",
    "router_entropy",
    "router_saturation",
    "suggested_placement",
    "vocabulary_specialization",
    "vocabulary_specialization_from_counts",
    "write_report",
    "write_routing_report",
]
