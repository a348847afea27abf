"""Folders of the routing metrics for `evaluate.load`; the functions behind them are those of this package.

Source: ours; each metric's card names the source of its formula.
"""

from pathlib import Path


_METRICS = Path(__file__).parent / "metrics"
ROUTING_IMBALANCE_FOLDER = str(_METRICS / "routing_imbalance")
ROUTER_SATURATION_FOLDER = str(_METRICS / "router_saturation")
VOCABULARY_SPECIALIZATION_FOLDER = str(_METRICS / "vocabulary_specialization")
EXPERT_COACTIVATION_FOLDER = str(_METRICS / "expert_coactivation")
