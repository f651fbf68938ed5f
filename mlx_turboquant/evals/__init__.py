"""Measuring what a cache costs, on any mlx-lm model; see `evaluate`."""

from .evaluate import evaluate
from .grid import EvalPlan
from .results import Evaluation

__all__ = ["EvalPlan", "Evaluation", "evaluate"]
