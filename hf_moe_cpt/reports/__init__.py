"""Reports for people: charts as SVG text, tables, pages that open without a network."""

from hf_moe_cpt.reports.charts import Mark, Series, interval_chart, line_chart, plot_schedule
from hf_moe_cpt.reports.tables import Section, write_report


__all__ = ["Mark", "Section", "Series", "interval_chart", "line_chart", "plot_schedule", "write_report"]
