"""Interim: the curves move here with the evaluation branch."""
from evaluation.charts import draw_curves

__all__ = ["draw_curves"]
