"""Reports for people: charts as SVG text, tables, pages that open without a network."""

from typing import TYPE_CHECKING

from hf_moe_cpt.lazy import lazy_names


if TYPE_CHECKING:
    from hf_moe_cpt.reports.charts import Mark, Series, interval_chart, line_chart, plot_schedule
    from hf_moe_cpt.reports.tables import Section, write_report

__all__ = ["Mark", "Section", "Series", "interval_chart", "line_chart", "plot_schedule", "write_report"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "hf_moe_cpt.reports.charts": ("Mark", "Series", "interval_chart", "line_chart", "plot_schedule"),
        "hf_moe_cpt.reports.tables": ("Section", "write_report"),
    },
)
