"""What training descends on."""

from gdfast.losses.arcface import ArcFaceHead, SoftmaxHead
from gdfast.losses.boxes import ciou, iou
from gdfast.losses.yolo import YoloLoss
from gdfast.ops.cross_entropy import cross_entropy

__all__ = ["ArcFaceHead", "SoftmaxHead", "YoloLoss", "ciou", "cross_entropy", "iou"]
