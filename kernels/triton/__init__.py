"""Triton kernels, installed as ``supy.kernels``; imported only where Triton is installed."""
