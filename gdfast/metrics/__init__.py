"""How good predictions are."""

from gdfast.metrics.classification import Classification, classification

__all__ = ["Classification", "classification"]
