"""Output layers with classes that no input can make the argmax: find them, prove it, prevent them.

Class k of the logits W x + b is argmaxable if some allowed x gives it a larger logit than every other class; otherwise
no input ever predicts it, however the network below is trained (kexue.fm 9046; arXiv 2203.06462).

>>> import numpy as np
>>> report = find_unargmaxable(np.array([[1., 2.], [2., 1.], [1., 0.], [0., 1.], [1., 1.]]))
>>> report.verdicts
['argmaxable', 'argmaxable', 'argmaxable', 'argmaxable', 'unargmaxable']
>>> proof = report.certificate(4)          # (1, 1) is an average of other rows, so it never exceeds all of them
>>> len(proof.dominators) > 1 and proof.residual < 1e-15
True
"""

from supy.argmax.certificates import Certificate, Report, verify
from supy.argmax.prevention import Monitor, half_square_bias, prevent_unargmaxable_
from supy.argmax.search import find_unargmaxable

__all__ = [
    "Certificate",
    "Monitor",
    "Report",
    "find_unargmaxable",
    "half_square_bias",
    "prevent_unargmaxable_",
    "verify",
]
