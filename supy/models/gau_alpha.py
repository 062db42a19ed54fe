"""GAU-alpha, the language model of post 9052, and what reads its published checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from supy._checkpoint import read_tensors
from supy._checks import require
from supy.models._pretrained import Pretrained, check_config
from supy.models._tensorflow import read_checkpoint
from supy.nn.gated_attention_unit import GatedAttentionUnit, gau_normal_


@dataclass(frozen=True)
class GAUAlphaConfig:
    """Sizes of :class:`GAUAlpha`, by the names of the published config.json; the defaults are the published model's.

    hidden_dropout_prob: of the embeddings, of what a unit adds, and before the head. layer_norm_eps: of the RMS norms;
    the original has 1e-7, the public PyTorch port 1e-12.
    """

    vocab_size: int = 12000
    type_vocab_size: int = 2
    hidden_size: int = 768
    intermediate_size: int = 1536
    attention_key_size: int = 128
    num_hidden_layers: int = 24
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-7

    def __post_init__(self):
        check_config(
            self, num_hidden_layers=(1, 1000), hidden_dropout_prob=(0, 1), layer_norm_eps=(0, 1)
        )
        even = self.attention_key_size % 2 == 0
        require(even, "GAUAlphaConfig", f"attention_key_size is {self.attention_key_size}, expected an even number")


class GAUAlpha(Pretrained):
    """The masked language model GAU-alpha: gated attention units for attention and feed-forward layers (post 9052).

        x = RMS(dropout(token + segment embedding))
        x = RMS(x + dropout(GAU(x)))                     for each of 24 layers
        logits = dropout(x) E^T                          E: the token embeddings

    RMS(x) = x / sqrt(mean(x^2) + eps), without a weight. The units are :class:`supy.nn.GatedAttentionUnit` without
    offset, with "softmax_plus" and rotary positions, so there is no longest text. The original, in training, also drops
    entries of the attention matrix, which the fused operator never has as a whole; this model does not.

    A new model has the original's initial values (`reset_parameters`). `from_pretrained` reads a folder with config.json
    (or bert_config.json) and one of model.safetensors, pytorch_model.bin (as by the public PyTorch port, with or
    without "gau_alpha." before the names; read with ``weights_only``) and bert_model.ckpt.index (TensorFlow's, as
    published). `save_pretrained` writes safetensors with the names of the PyTorch port.

    The published vocab.txt is what ``tokenizers.BertWordPieceTokenizer("vocab.txt", lowercase=True)`` reads.

    >>> config = GAUAlphaConfig(100, hidden_size=16, intermediate_size=32, attention_key_size=8, num_hidden_layers=2)
    >>> model = GAUAlpha(config).eval()
    >>> model(torch.tensor([[2, 7, 3, 0], [2, 7, 9, 3]]), lengths=torch.tensor([3, 4])).shape
    torch.Size([2, 4, 100])
    """

    Config: ClassVar[type] = GAUAlphaConfig
    model_type: ClassVar[str] = "gau_alpha"
    config_files: ClassVar[tuple[str, ...]] = ("config.json", "bert_config.json")

    def __init__(self, config: GAUAlphaConfig = GAUAlphaConfig()):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.segments = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.units = nn.ModuleList(
            GatedAttentionUnit(
                config.hidden_size,
                value_size=config.intermediate_size,
                key_size=config.attention_key_size,
                offset=False,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal values cut off at two sigma, of standard deviation 1 / sqrt(h) / layers^(1/3); scales are 1.

        h is the first size in TensorFlow's order (the input of a product; a vocabulary), the second where the first is
        below 10 or above 10,000.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                shape = module.weight.shape if isinstance(module, nn.Embedding) else module.weight.mT.shape
                h = shape[0] if 10 <= shape[0] <= 10000 else shape[1]
                gau_normal_(module.weight, h, self.config.num_hidden_layers)
        for unit in self.units:
            nn.init.ones_(unit.scale)

    def forward(
        self,
        ids: torch.Tensor,
        segments: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of every token at each place, before softmax: `[B, T, vocab_size]`; arguments as in `encode`."""
        hidden = self.encode(ids, segments, lengths=lengths)
        return F.linear(self._dropout(hidden), self.tokens.weight)

    def encode(
        self,
        ids: torch.Tensor,
        segments: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids int64 `[B, T]`, segments the same or None for 0, lengths int `[B]` or None: `[B, T, hidden_size]`."""
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self._norm(self._dropout(self.tokens(ids) + self.segments(segments)))
        for unit in self.units:
            x = self._norm(x + self._dropout(unit(x, lengths=lengths)))
        return x

    def _dropout(self, x):
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)

    def _norm(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)

    def load_tensorflow_(self, variables: Mapping[str, Any] | Sequence[Any] | Path | str) -> Self:
        """Copies in the variables of the published TensorFlow model; its kernels `[in, out]` are transposed.

        Args:
            variables: names and arrays; or the arrays alone, in the order of the Keras model's ``get_weights()``, of
                bert4keras before or after 0.10.4; or the path of a TensorFlow checkpoint, such as "bert_model.ckpt"
                (TensorFlow is not needed).

        Raises:
            ValueError: a variable is missing, unknown or of another shape, or a file is damaged.
            TypeError: a variable is no array of floating-point numbers.
        """
        if isinstance(variables, (str, Path)):
            variables = read_checkpoint(Path(variables))
        elif not isinstance(variables, Mapping):
            variables = self._name_keras(list(variables))
        return self._assign(variables, self._tensorflow_variables)

    def load_pytorch_(self, weights: Mapping[str, Any] | Path | str) -> Self:
        """Copies in the variables of the public PyTorch port: names and tensors, or a .bin or .safetensors file.

        The names may lack "gau_alpha.", and a head may be there that is the token embedding once more. Raises as
        `load_tensorflow_` does.
        """
        if not isinstance(weights, Mapping):
            weights = _read_pytorch(Path(weights))
        weights = {
            f"gau_alpha.{name}" if name.startswith(("embeddings.", "encoder.")) else name: value
            for name, value in weights.items()
        }
        head, tokens = "cls.predictions.decoder.weight", "gau_alpha.embeddings.word_embeddings.weight"
        if head in weights and tokens in weights:
            tied = torch.equal(torch.as_tensor(weights.pop(head)), torch.as_tensor(weights[tokens]))
            require(tied, "GAUAlpha", f"variable {head} has other values than {tokens}, expected the same")
        return self._assign(weights, self._variables)

    def _variables(self):
        return {
            "gau_alpha.embeddings.word_embeddings.weight": self.tokens.weight,
            "gau_alpha.embeddings.token_type_embeddings.weight": self.segments.weight,
            **{
                f"gau_alpha.encoder.layer.{i}.gau.{name}.weight": value
                for i, unit in enumerate(self.units)
                for name, value in _parts(unit).items()
            },
        }

    def _tensorflow_variables(self):
        """In the order of Keras, kernels with the input first."""
        kinds = {"i_dense": "kernel", "o_dense": "kernel", "q_scaleoffset": "gamma", "k_scaleoffset": "gamma"}
        return {
            "bert/embeddings/word_embeddings": self.tokens.weight,
            "bert/embeddings/token_type_embeddings": self.segments.weight,
            **{
                f"GAU_alpha/encoder/layer_{i}/gau/{name}/{kinds[name]}": value.mT if value.ndim == 2 else value
                for i, unit in enumerate(self.units)
                for name, value in _parts(unit).items()
            },
        }

    def _name_keras(self, arrays: list[Any]) -> dict[str, Any]:
        names = list(self._tensorflow_variables())
        agrees = len(arrays) == len(names)
        require(agrees, "GAUAlpha", f"variables has {len(arrays)} arrays, expected {len(names)}")
        for i in range(2, len(arrays), 4):  # until bert4keras 0.10.4 the output's kernel stood behind the input's
            if np.ndim(arrays[i + 1]) == 2:
                arrays[i + 1 : i + 4] = arrays[i + 2], arrays[i + 3], arrays[i + 1]
        return dict(zip(names, arrays, strict=True))

    def _load(self, folder):
        for name, load in (
            ("model.safetensors", self.load_pytorch_),
            ("pytorch_model.bin", self.load_pytorch_),
            ("bert_model.ckpt.index", self.load_tensorflow_),
        ):
            if (folder / name).exists():
                load(folder / name.removesuffix(".index"))
                return
        raise ValueError(
            f"supy.GAUAlpha.from_pretrained: folder {folder} has no weights, expected model.safetensors, "
            "pytorch_model.bin or bert_model.ckpt.index"
        )

    @staticmethod
    def _fixed(values):
        return {
            "hidden_act": ("swish", "silu"),
            "normalization": ("softmax_plus",),
            "attention_scale": (True,),
            "use_bias": (False,),
            "embedding_size": (values.get("hidden_size", GAUAlphaConfig.hidden_size), None),
        }


def _parts(unit: GatedAttentionUnit) -> dict[str, torch.Tensor]:
    """A unit's variables by their published names, in the order of Keras."""
    return {
        "i_dense": unit.project_in.weight,
        "q_scaleoffset": unit.scale[0],
        "k_scaleoffset": unit.scale[1],
        "o_dense": unit.project_out.weight,
    }


def _read_pytorch(path: Path) -> Mapping[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"supy.GAUAlpha: {path} is no file of tensors ({reason})") from None
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    require(named, "GAUAlpha", f"{path} holds a {type(weights).__name__}, expected names and tensors")
    return weights
