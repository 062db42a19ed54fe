"""Rotary positions in NumPy, pair by pair, for the independent computations of whole models."""

import math

import numpy as np


def rotate(x):
    out = np.empty_like(x)
    for t in range(len(x)):
        for i in range(0, x.shape[1], 2):
            angle = t * 10000.0 ** (-i / x.shape[1])
            sine, cosine = math.sin(angle), math.cos(angle)
            out[t, i] = x[t, i] * cosine - x[t, i + 1] * sine
            out[t, i + 1] = x[t, i + 1] * cosine + x[t, i] * sine
    return out
