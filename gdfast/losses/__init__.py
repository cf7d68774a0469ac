"""What training descends on."""

from gdfast.losses.arcface import ArcFaceHead, SoftmaxHead
from gdfast.losses.boxes import ciou, iou
from gdfast.losses.yolo import YoloLoss

__all__ = ["ArcFaceHead", "SoftmaxHead", "YoloLoss", "ciou", "iou"]
