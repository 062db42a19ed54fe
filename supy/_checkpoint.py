"""Files that a kill at any moment leaves whole: a training run's state, and a trained model's folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes


class ModelError(ValueError):
    """A model folder or a checkpoint lacks a file, or a file is damaged or of another run."""


def write_atomically(path: Path, content: bytes) -> None:
    """The file holds all of ``content`` or what it held before, even if the machine stops meanwhile."""
    write_together({path: content})


def write_together(files: dict[Path, bytes]) -> None:
    """Writes files that belong together, the one that is read first as the last of them.

    A kill leaves all the old ones, all the new ones, or, where the last one changes, none under its name: never a
    mixture.
    """
    *_, last = files
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if len(files) > 1 and last.exists() and last.read_bytes() != files[last]:
            last.unlink()
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ModelError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{path}: expected a safetensors file, found none") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


def save_model(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes ``config.json`` and the weights it names. The old pair stays valid until the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    content = to_bytes({name: value.contiguous().cpu() for name, value in tensors.items()})
    weights = f"model-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    write_atomically(folder / weights, content)
    text = json.dumps({**config, "weights": weights}, ensure_ascii=False, indent=1) + "\n"
    write_atomically(folder / "config.json", text.encode())
    for old in folder.glob("model-*.safetensors"):
        if old.name != weights:
            old.unlink()


def load_model(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and weights that `save_model` wrote, checked against their digest."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        weights = folder / Path(config["weights"]).name
    except FileNotFoundError:
        raise ModelError(f"{path}: expected a model's configuration, found none") from None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{path}: not a model's configuration ({error!r})") from None
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ModelError(f"{weights}: cannot read the weights ({error.strerror})") from None
    if digest not in weights.name:
        raise ModelError(f"{weights}: the file is damaged (its digest is {digest})")
    return config, read_tensors(weights)[0]


class Checkpoint:
    """The state of one training run, in one file of its folder.

    settings: what the run depends on, in JSON's types; a checkpoint with others is refused.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any]):
        self.path = Path(folder) / "checkpoint.safetensors"
        self.settings = settings

    def save(self, groups: dict[str, dict[str, torch.Tensor]], progress: dict[str, Any]) -> None:
        """groups: named dictionaries of tensors."""
        tensors = {
            f"{group}/{name}": value.detach().contiguous().cpu()
            for group, values in groups.items()
            for name, value in values.items()
        }
        metadata = {"settings": json.dumps(self.settings), "progress": json.dumps(progress)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, to_bytes(tensors, metadata))

    def load(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
        """What `save` was given, or None if there is no checkpoint; ModelError if it is of another run."""
        if not self.path.exists():
            return None
        tensors, metadata = read_tensors(self.path)
        try:
            settings, progress = (json.loads(metadata[key]) for key in ("settings", "progress"))
        except (KeyError, ValueError):
            raise ModelError(f"{self.path}: not a checkpoint of supy") from None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ModelError(
                    f"{self.path} is of another run: {name} was {settings.get(name)!r:.80}, now it is "
                    f"{value!r:.80}; give another folder, or remove the file to start anew"
                )
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value
        return groups, progress

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        for left in self.path.parent.glob(f".{self.path.name}.*"):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimiser as a group of tensors for `Checkpoint.save`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value for i, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
