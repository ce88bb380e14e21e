"""Triton kernels of a decode step: launch-safe inside a CUDA graph, nothing read on the host.

`methods.fused` is their front; `methods.kernels.reference` computes the same in plain torch.
"""
