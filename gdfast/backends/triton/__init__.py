"""Kernels in Triton, one operation per file, and how they are launched.

They know geometries, strides and tensors; which query they run is decided one floor up, in
`gdfast.backends.triton_backend`. Everything but this file imports triton, so import late.
"""
