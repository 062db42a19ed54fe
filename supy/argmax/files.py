"""Output layers from files, and reports to and from JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from supy._checkpoint import write_atomically
from supy.argmax.certificates import VERDICTS, Certificate, Report

# What output layers are called, the likeliest first; an embedding stands in for the layer that is tied to it.
_NAMES = ("lm_head", "cls.predictions.decoder", "classifier.out_proj", "classifier", "score", "head", "fc", "output",
          "linear", "", "wte", "transformer.wte", "model.embed_tokens", "model.shared", "shared",
          *(f"{model}embeddings.word_embeddings" for model in ("", "bert.", "roberta.")))  # fmt: skip
FORMAT = "supy.argmax/2"
OPTIONS = ("bound", "nonnegative", "lower", "upper")  # of a search, in a report
_BIASES = {"cls.predictions.decoder.weight": "cls.predictions.bias", "lm_head.weight": "lm_head.bias",
           "bert.embeddings.word_embeddings.weight": "cls.predictions.bias",
           "roberta.embeddings.word_embeddings.weight": "lm_head.bias",
           "model.shared.weight": "final_logits_bias"}  # fmt: skip


def read_head(
    path: str | Path, weight: str | None = None, bias: str | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight ``[K, d]``, bias ``[K]`` or None) of an output layer in a file or a Hugging Face folder.

    Args:
        path: .npz, .npy, .safetensors, a PyTorch state dict (.pt, .pth, .bin, .ckpt: tensors only), .onnx (needs the
            package onnx), or a folder with one of model.safetensors, its index, or pytorch_model.bin.
        weight: the weight's name. Without it: the only matrix, or the one with an output layer's usual name; of ONNX
            the last matrix product.
        bias: the bias's name. Without it: the one beside the weight, if there is one.

    Raises:
        ValueError: the file is damaged, of an unknown kind, carries executable pickles, or has no such array.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".onnx" and weight is None:
        return _onnx_head(path)
    arrays = _folder(path) if path.is_dir() else _read(path)
    if weight is None:
        weight = _guess(path, arrays)
    if weight not in arrays:
        raise ValueError(f"{path}: no array is called {weight!r}; there are {_some(arrays)}")
    if bias is None:
        stem = weight.removesuffix("weight")
        candidates = (f"{stem}bias" if weight.endswith("weight") else "bias", _BIASES.get(weight))
        bias = next((name for name in candidates if name in arrays and name != weight), None)
    elif bias not in arrays:
        raise ValueError(f"{path}: no array is called {bias!r}; there are {_some(arrays)}")
    return arrays[weight], None if bias is None else arrays[bias].reshape(-1)


def read_labels(path: str | Path, name: str | None = None) -> list[str]:
    """A label a line; or the array ``labels`` (or ``name``) of an .npz."""
    path = Path(path)
    if path.suffix == ".npz":
        arrays = _read(path, text=True)
        if (name or "labels") not in arrays:
            raise ValueError(f"{path}: no array is called {name or 'labels'!r}; there are {_some(arrays)}")
        return [str(label) for label in arrays[name or "labels"]]
    return path.read_text(encoding="utf-8").splitlines()


def _some(arrays) -> str:
    names = [f"{name} {list(array.shape)}" for name, array in arrays.items()]
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)


def _guess(path, arrays) -> str:
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if len(matrices) == 1:
        return matrices[0]
    for name in _NAMES:
        full = f"{name}.weight" if name else "weight"
        if full in matrices:
            return full
    raise ValueError(f"{path}: name the output layer's weight with --weight; there are {_some(arrays)}")


def _read(path: Path, text: bool = False) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".npy":
            arrays = {"weight": np.load(path, allow_pickle=False)}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                arrays = {name: _array(file.get_tensor(name)) for name in file.keys()}
        elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            arrays = _state_dict(path)
        elif path.suffix == ".onnx":
            graph, numpy_helper = _onnx(path)
            arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        else:
            raise ValueError("expected .npz, .npy, .safetensors, .pt, .pth, .bin, .ckpt, .onnx or a folder")
    except ImportError:
        raise
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # safetensors and onnx have exceptions of their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    return arrays if text else {name: array for name, array in arrays.items() if array.dtype.kind in "fiu"}


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what a broken or hostile pickle raises is not listed anywhere
        raise ValueError("not a PyTorch file of tensors alone (damaged, or it carries executable pickles)") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"expected a state dict, got a {type(state).__name__}")
    return {name: _array(value) for name, value in state.items() if isinstance(value, torch.Tensor)}


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def _folder(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index}: expected an object with a weight_map") from None
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: it names a file outside its folder")
        return {key: array for name in names for key, array in _read(folder / name).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return _read(folder / name)
    raise ValueError(f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin in it")


def _onnx(path: Path):
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ImportError("ONNX files need the package onnx: pip install onnx") from None
    return onnx.load(path).graph, numpy_helper


def _onnx_head(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The last product with a constant matrix, and the constant that is added to it."""
    arrays = _read(path)
    graph, _ = _onnx(path)
    for node in reversed(graph.node):
        constants = [name for name in node.input if name in arrays and arrays[name].ndim == 2]
        if node.op_type not in ("MatMul", "Gemm") or not constants:
            continue
        weight = arrays[constants[0]]
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        weight = weight if transposed else weight.T  # [d, K] in a MatMul
        added = [name for name in node.input if name in arrays and arrays[name].ndim == 1]
        for later in graph.node:
            if later.op_type == "Add" and node.output[0] in later.input:
                added += [name for name in later.input if name in arrays and arrays[name].ndim == 1]
        return np.ascontiguousarray(weight), arrays[added[0]] if added else None
    raise ValueError(f"{path}: no product with a constant matrix; name the weight with --weight, of {_some(arrays)}")


def write_report(path: str | Path, report: Report, options: dict, labels: list[str] | None = None) -> None:
    """JSON with every certificate; written to a temporary file, then renamed."""
    layer, classes, groups = report.layer, [], {}
    for proof in report.certificates():
        entry = {"class": proof.index, "verdict": proof.verdict}
        if labels is not None:
            entry["label"] = labels[proof.index]
        if proof.witness is not None:
            entry |= {"witness": proof.witness.tolist(), "margin": proof.margin if np.isfinite(proof.margin) else None}
        if proof.twins:
            entry["group"] = groups.setdefault(proof.twins[0], (len(groups), proof.twins))[0]
        if proof.dominators:
            entry |= {"dominators": [[i, a] for i, a in proof.dominators.items()],
                      "residual": proof.residual, "surplus": proof.surplus}  # fmt: skip
        classes.append(entry)
    whole = {"format": FORMAT, "shape": list(layer.weight.shape), "options": options,
             "groups": [twins for _, twins in groups.values()], "classes": classes}  # fmt: skip
    write_atomically(Path(path), (json.dumps(whole, ensure_ascii=False) + "\n").encode())


def _class(number) -> int:
    if not 0 <= int(number) < 2**63:
        raise ValueError(f"class {number}")
    return int(number)


def read_report(path: str | Path) -> tuple[list[Certificate], dict]:
    """The certificates and the options of a report that :func:`write_report` wrote."""
    try:
        whole = json.loads(Path(path).read_bytes())
        if whole["format"] != FORMAT:
            raise ValueError("another format")
        options = {name: (bool if name == "nonnegative" else float)(value) for name, value in whole["options"].items()}
        if not options.keys() <= set(OPTIONS):
            raise ValueError(f"options {sorted(options)}")
        certificates, groups = [], [tuple(_class(k) for k in group) for group in whole["groups"]]
        for entry in whole["classes"]:
            if entry["verdict"] not in VERDICTS:
                raise ValueError(f"verdict {entry['verdict']!r}")
            witness = entry.get("witness")
            certificates.append(Certificate(
                _class(entry["class"]), entry["verdict"],
                None if witness is None else np.array(witness, dtype=np.float64),
                twins=groups[entry["group"]] if "group" in entry else (),
                dominators={_class(i): float(a) for i, a in entry.get("dominators", ())},
            ))  # fmt: skip
        return certificates, options
    except OSError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a report of supy argmax check ({type(error).__name__}: {error})") from None
