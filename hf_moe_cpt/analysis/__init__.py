"""What a router and a model do while the data changes: routing metrics, forgetting, charts and reports."""

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.forgetting import ContinualOutcome, adaptation, forgetting
from hf_moe_cpt.analysis.report import Section, write_report
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
from hf_moe_cpt.analysis.schedule_plot import plot_schedule


__all__ = [
    "ContinualOutcome",
    "ImbalanceShift",
    "Mark",
    "Section",
    "Series",
    "adaptation",
    "expert_load",
    "forgetting",
    "imbalance_around_shift",
    "line_chart",
    "load_entropy",
    "max_routing_imbalance",
    "max_routing_imbalance_from_load",
    "normalized_imbalance",
    "plot_schedule",
    "recovery_step",
    "write_report",
]
