"""The public operators; each is documented where it is defined, in the file of its name."""

from supy.ops.rotary import rotary

__all__ = ["rotary"]
