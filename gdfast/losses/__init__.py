"""What training descends on."""

from gdfast.losses.arcface import ArcFaceHead, SoftmaxHead

__all__ = ["ArcFaceHead", "SoftmaxHead"]
