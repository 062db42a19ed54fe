"""Weights of published GlobalPointer layers, loaded into supy's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from supy.nn.efficient_global_pointer import EfficientGlobalPointer
from supy.nn.global_pointer import GlobalPointer

Pointer = GlobalPointer | EfficientGlobalPointer


@torch.no_grad()
def load_bert4keras_(pointer: Pointer, weights: Sequence[Any]) -> Pointer:
    """Loads the weights of bert4keras' layer of the same name, which then gives the same scores.

    Make the module with the layer's sizes, ``rotary=RoPE``, ``bias=use_bias`` and ``tril=tril_mask``. The published
    efficient form takes q from the even and k from the odd channels of its first dense layer; of the second, halved, it
    adds the even outputs along the ends and the odd ones along the starts.

    Args:
        pointer: the module, changed in place.
        weights: what the layer's ``get_weights()`` returns, NumPy arrays or tensors: kernel `[dim, heads * 2 * D]` and
            bias; for the efficient form kernel `[dim, 2 * D]`, bias, kernel `[2 * D, 2 * heads]`, bias.

    Returns:
        The module.

    Raises:
        ValueError: their number or a shape does not fit the module, which is then unchanged.
        TypeError: an element is not an array of floating-point numbers, or the module is of another class.

    >>> from supy.nn import GlobalPointer
    >>> import numpy as np
    >>> pointer = load_bert4keras_(GlobalPointer(8, heads=2, head_size=4), [np.ones((8, 16)), np.zeros(16)])
    >>> pointer.query_key.weight.sum().item()
    128.0
    """
    op = "load_bert4keras_"
    expected = _sizes(op, pointer)
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence):
        raise TypeError(f"supy.{op}: weights is a {type(weights).__name__}, expected a list of arrays")
    if len(weights) != len(expected):
        raise ValueError(
            f"supy.{op}: weights has {len(weights)} arrays, expected {len(expected)}: {', '.join(expected)}"
        )
    # Kernels are [in, out].
    found = {
        name: _tensor(op, f"weights[{i}] ({name})", value, shape[::-1]).t()
        for i, ((name, shape), value) in enumerate(zip(expected.items(), weights))
    }
    if isinstance(pointer, EfficientGlobalPointer):
        for name, value in found.items():
            even, odd = value[::2], value[1::2]
            found[name] = torch.cat([even, odd] if name.startswith("p_dense") else [odd, even])
        kernel = found["q_dense.weight"]  # its inputs are the outputs of p_dense
        found["q_dense.weight"] = torch.cat([kernel[:, ::2], kernel[:, 1::2]], 1)
    return _assign(pointer, found)


@torch.no_grad()
def load_bert4torch_(pointer: Pointer, weights: Mapping[str, Any], *, prefix: str = "") -> Pointer:
    """Loads the weights of bert4torch's layer of the same name, which then gives the same scores.

    Make the module with the layer's sizes, ``rotary=RoPE``, ``bias=use_bias`` and ``tril=tril_mask``. The published
    efficient form takes q and k from the halves of its first layer; of the second, halved, it adds the even outputs
    along the starts and the odd ones along the ends. Masked cells are -inf here, some are about -1e12 there.

    Args:
        pointer: the module, changed in place.
        weights: the layer's ``state_dict()``, tensors or NumPy arrays: "dense.weight" and "dense.bias"; for the
            efficient form "p_dense.weight", "p_dense.bias", "q_dense.weight" and "q_dense.bias". Tables of positions are
            passed over. Read a file with ``torch.load(path, weights_only=True)`` or safetensors.
        prefix: of the layer's names in the state of a whole model, for example "global_pointer."; names that do not
            begin with it are passed over.

    Returns:
        The module.

    Raises:
        ValueError: a name is missing or unknown, or a shape does not fit the module, which is then unchanged.
        TypeError: a value is not an array of floating-point numbers, or the module is of another class.

    >>> from supy.nn import GlobalPointer
    >>> state = {"head.dense.weight": torch.ones(16, 8), "head.dense.bias": torch.zeros(16)}
    >>> pointer = load_bert4torch_(GlobalPointer(8, heads=2, head_size=4), state, prefix="head.")
    >>> pointer.query_key.weight.sum().item()
    128.0
    """
    op = "load_bert4torch_"
    expected = _sizes(op, pointer)
    if not isinstance(weights, Mapping):
        raise TypeError(f"supy.{op}: weights is a {type(weights).__name__}, expected names and arrays")
    names = {
        name
        for name in map(str, weights)
        if name.startswith(prefix) and not name.startswith(prefix + "position_embedding.")
    }
    wanted = {prefix + name for name in expected}
    if names != wanted:
        missing, unknown = (", ".join(sorted(some)) or "none" for some in (wanted - names, names - wanted))
        raise ValueError(f"supy.{op}: weights has names missing: {missing}; unknown: {unknown}")
    found = {
        name: _tensor(op, prefix + name, weights[prefix + name], shape)
        for name, shape in expected.items()
    }
    if isinstance(pointer, EfficientGlobalPointer):
        for name in found:
            if name.startswith("q_dense"):
                found[name] = torch.cat([found[name][::2], found[name][1::2]])
    return _assign(pointer, found)


_MODULES = {"dense": "query_key", "p_dense": "query_key", "q_dense": "biases"}


def _sizes(op: str, pointer: Pointer) -> dict[str, list[int]]:
    """The published layer's names of the module's parameters, with their shapes in PyTorch's order."""
    if isinstance(pointer, EfficientGlobalPointer):
        layers = {"p_dense": pointer.query_key, "q_dense": pointer.biases}
    elif isinstance(pointer, GlobalPointer):
        layers = {"dense": pointer.query_key}
    else:
        raise TypeError(
            f"supy.{op}: pointer is a {type(pointer).__name__}, expected a GlobalPointer or an EfficientGlobalPointer"
        )
    return {
        f"{layer}.{name}": list(parameter.shape)
        for layer, linear in layers.items()
        for name, parameter in linear.named_parameters()
    }


def _tensor(op: str, name: str, value: Any, shape: list[int]) -> torch.Tensor:
    try:
        value = value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"supy.{op}: {name} is a {type(value).__name__} that is no array of numbers ({error})"
        ) from None
    if not value.is_floating_point():
        raise TypeError(f"supy.{op}: {name} has dtype {value.dtype}, expected a floating-point dtype")
    if list(value.shape) != shape:
        raise ValueError(f"supy.{op}: {name} has shape {list(value.shape)}, expected {shape}")
    return value


def _assign(pointer: Pointer, found: dict[str, torch.Tensor]) -> Pointer:
    for path, value in found.items():
        layer, name = path.split(".")
        halved = value / 2 if layer == "q_dense" else value
        getattr(getattr(pointer, _MODULES[layer]), name).copy_(halved)
    return pointer
