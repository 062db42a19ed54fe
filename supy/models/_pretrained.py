"""What the models share: a folder with config.json and model.safetensors; weights are checked before any is set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from supy._checkpoint import read_tensors, write_together
from supy._checks import require

LARGEST = 2**24  # of a size in a config, so that a hostile one is refused instead of computed with


class Pretrained(nn.Module):
    """A network with a config, which `save_pretrained` writes to a folder and `from_pretrained` reads.

    A subclass has a dataclass ``Config`` and a ``model_type``, and may give its parameters other names in files.
    """

    Config: ClassVar[type]
    model_type: ClassVar[str]
    config_files: ClassVar[tuple[str, ...]] = ("config.json",)

    def __init__(self, config: Any):
        super().__init__()
        if not isinstance(config, self.Config):
            name = type(self).__name__
            raise TypeError(
                f"supy.{name}: config is a {type(config).__name__}, expected a {self.Config.__name__}"
            )
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model in a folder, in float32 on the CPU and in evaluation mode.

        Raises:
            ValueError: a file is missing or damaged, or a variable is missing, unknown or of another shape.
            TypeError: a variable is no array of floating-point numbers.
        """
        with torch.device("meta"):  # no memory and no initial values before the files are seen to fit
            model = cls(cls._read_config(Path(folder)))
        model._load(Path(folder))
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes config.json and model.safetensors; other files, such as vocab.txt, stay as they are.

        A kill meanwhile leaves the old model, the new one, or a folder without config.json, but never a mixture.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous().cpu() for name, value in self._variables().items()}
        config = {"model_type": self.model_type, **asdict(self.config)}
        files = {"model.safetensors": to_bytes(tensors, {"format": "pt"})}
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        write_together({folder / name: content for name, content in files.items()})

    @classmethod
    def _read_config(cls, folder: Path) -> Any:
        op = f"{cls.__name__}.from_pretrained"
        path = next(filter(Path.exists, (folder / name for name in cls.config_files)), None)
        require(path is not None, op, f"folder {folder} has no {cls.config_files[0]}, expected a model's folder")
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"supy.{op}: {path} is not JSON ({error})") from None
        require(isinstance(values, dict), op, f"{path} holds a {type(values).__name__}, expected an object")
        for name, expected in {"model_type": (cls.model_type,), **cls._fixed(values)}.items():
            value = values.get(name, expected[0])
            require(value in expected, op, f"{path} has {name} {value!r}, expected {expected[0]!r}")
        known = {field.name: field.default for field in fields(cls.Config)}
        for name, default in known.items():
            require(name in values or default is not MISSING, op, f"{path} has no {name}")
        return cls.Config(**{name: value for name, value in values.items() if name in known})

    @staticmethod
    def _fixed(values: dict[str, Any]) -> dict[str, tuple]:
        """What of a config the model has in one form only, and the values that mean it."""
        return {}

    def _load(self, folder: Path) -> None:
        self._assign(read_tensors(folder / "model.safetensors")[0], self._variables)

    def _variables(self) -> dict[str, torch.Tensor]:
        """Every variable of a file, by its name there: a parameter or a part of one."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Any], variables: Callable[[], dict[str, torch.Tensor]]) -> Self:
        """Copies arrays into all variables, or none if one does not fit."""
        op, wanted = type(self).__name__, variables()
        for kind, names in (
            ("lacks", wanted.keys() - weights.keys()),
            ("has unknown", weights.keys() - wanted.keys()),
        ):
            some = ", ".join(sorted(names)[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            require(not names, op, f"the checkpoint {kind} variables {some}")
        found = {name: _tensor(op, name, weights[name], v.shape) for name, v in wanted.items()}
        if any(parameter.is_meta for parameter in self.parameters()):
            self.to_empty(device="cpu")
            for buffer in self.buffers():  # units without offset have it as a buffer of zeros
                buffer.zero_()
        for name, variable in variables().items():
            variable.copy_(found[name])
        return self


def _tensor(op: str, name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    """An array or a tensor as a floating-point tensor of this shape."""
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except (TypeError, ValueError) as error:
            raise TypeError(f"supy.{op}: variable {name} is no array of numbers ({error})") from None
    if not value.is_floating_point():
        raise TypeError(f"supy.{op}: variable {name} has dtype {value.dtype}, expected a floating-point dtype")
    fits = value.shape == shape
    require(fits, op, f"variable {name} has shape {list(value.shape)}, expected {list(shape)}")
    return value


def check_config(config: Any, **limits: tuple[float, float]) -> None:
    """Refuses a field of another type, a size below 1 or above `LARGEST`, and what is out of its ``limits``.

    JSON has lists for tuples: they become tuples here.
    """
    op = type(config).__name__
    types = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if several := kind == "tuple[int, ...]":
            value, kind = tuple(value) if isinstance(value, (list, tuple)) else (), "int"
            require(value, op, f"{field.name} is {getattr(config, field.name)!r}, expected one or more integers")
            object.__setattr__(config, field.name, value)
        for one in value if several else (value,):
            right = isinstance(one, types[kind]) and (kind == "bool" or not isinstance(one, bool))
            require(right, op, f"{field.name} is {value!r}, expected {field.type}")
            if kind in ("int", "float"):
                low, high = limits.get(field.name, (1, LARGEST))
                require(low <= one <= high, op, f"{field.name} is {value}, expected {low} to {high}")
