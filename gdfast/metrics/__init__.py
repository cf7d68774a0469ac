"""How good predictions are."""

from gdfast.metrics.classification import Classification, classification
from gdfast.metrics.detection import DetectionScore, Found, Truth, detection

__all__ = [
    "Classification",
    "DetectionScore",
    "Found",
    "Truth",
    "classification",
    "detection",
]
