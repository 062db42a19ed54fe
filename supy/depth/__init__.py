"""Very deep networks: what a step of training does to them at several depths, and the two analyses behind it.

>>> study = probe("post", [6, 12], rates={"sgd": 1e-3}, seeds=1, shape=(2, 5, 16))
>>> study.probes[1].steps["sgd"].update > study.probes[0].steps["sgd"].update
True

The networks themselves are :class:`supy.nn.DeepEncoder` and its kin.
"""

from supy.depth.analysis import GauScale, ResidualGain, gau_scale, residual_gain, save_gain_picture
from supy.depth.probe import FAMILIES, Layer, Probe, Step, Study, find_layers, probe
from supy.depth.report import save_picture, sentences, table, to_json, write_json

__all__ = [
    "FAMILIES",
    "GauScale",
    "Layer",
    "Probe",
    "ResidualGain",
    "Step",
    "Study",
    "find_layers",
    "gau_scale",
    "probe",
    "residual_gain",
    "save_gain_picture",
    "save_picture",
    "sentences",
    "table",
    "to_json",
    "write_json",
]
