"""The constants of DeepNorm and the initial weights that go with them (arXiv 2203.00555; kexue.fm post 8978)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from supy._checks import require
from supy.nn.gated_attention_unit import GatedAttentionUnit
from supy.nn.mixed_chunk_attention import MixedChunkAttention

# alpha and beta as powers of 2 N, for N layers of attention and feed-forward network (post 8978).
_OPTIMIZERS = {"sgd": (1 / 4, -1 / 4), "adam": (1 / 2, -1 / 2), "lamb": (0.0, -1 / 2)}


class DeepNormConstants(NamedTuple):
    """x = Norm(alpha x + branch(x)), and beta scales the branch's initial matrices."""

    alpha: float
    beta: float


def deepnorm_constants(
    kind: str,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    *,
    optimizer: str | None = None,
) -> DeepNormConstants | tuple[DeepNormConstants, DeepNormConstants]:
    """alpha and beta for a network of so many layers (arXiv 2203.00555; post 8978).

    A layer is attention and a feed-forward network, of a decoder behind an encoder also the attention between them.

    | kind | alpha | beta |
    |---|---|---|
    | `"encoder"`, N layers | (2 N)^(1/4) | (8 N)^(-1/4) |
    | `"decoder"`, M layers, without an encoder | (2 M)^(1/4) | (8 M)^(-1/4) |
    | `"encoder-decoder"`, the encoder | 0.81 (N^4 M)^(1/16) | 0.87 (N^4 M)^(-1/16) |
    | `"encoder-decoder"`, the decoder | (3 M)^(1/4) | (12 M)^(-1/4) |

    These are the paper's. torchscale's encoder of an encoder-decoder has beta = 1.15 (N^4 M)^(-1/16), about the
    inverse of 0.87, and scales biases too. Code after GLM-130B has alpha = (2 N)^(1/2): that is the row of Adam below.

    optimizer: post 8978's constants for one stack instead, with which the loss changes by O(1) in the first step
    whatever the depth. The paper's alpha is that of SGD, and its bound on beta stricter by 4^(1/4).

    | optimizer | step | alpha | beta |
    |---|---|---|---|
    | `"sgd"` | along the gradient | (2 N)^(1/4) | (2 N)^(-1/4) |
    | `"adam"` | along its sign | (2 N)^(1/2) | (2 N)^(-1/2) |
    | `"lamb"` | along its sign, as long as the weights | 1 | (2 N)^(-1/2) |

    Returns:
        (alpha, beta); for an encoder-decoder a pair of them, the encoder's first.

    Raises:
        ValueError: an unknown kind or optimizer, a number of layers below 1, or one that the kind has no use for.

    >>> alpha, beta = deepnorm_constants("encoder", 12)
    >>> f"{alpha:.4f} {beta:.4f}"
    '2.2134 0.3195'
    >>> encoder, decoder = deepnorm_constants("encoder-decoder", 18, 18)
    >>> f"{encoder.alpha:.4f} {encoder.beta:.4f} {decoder.alpha:.4f} {decoder.beta:.4f}"
    '1.9987 0.3526 2.7108 0.2608'
    """
    op = "deepnorm_constants"
    used = {"encoder": (True, False), "decoder": (False, True), "encoder-decoder": (True, True)}
    name = str(kind).replace("_", "-").removesuffix("-only")
    require(name in used, op, f"kind is {kind!r}, expected one of {', '.join(used)}")
    for given, wanted, argument in zip(
        (encoder_layers, decoder_layers), used[name], ("encoder_layers", "decoder_layers")
    ):
        if wanted:
            good = isinstance(given, int) and not isinstance(given, bool) and given >= 1
            require(good, op, f"{argument} is {given!r}, expected a whole number of at least 1 for kind {name!r}")
        else:
            require(not given, op, f"{argument} is {given!r}, expected none for kind {name!r}")
    require(optimizer is None or optimizer in _OPTIMIZERS, op,
            f"optimizer is {optimizer!r}, expected one of {', '.join(_OPTIMIZERS)}, or None")  # fmt: skip
    if name == "encoder-decoder":
        require(optimizer is None, op, f"optimizer is {optimizer!r}, expected None for an encoder-decoder")
        both = (encoder_layers**4 * decoder_layers) ** (1 / 16)
        decoder = DeepNormConstants((3 * decoder_layers) ** 0.25, (12 * decoder_layers) ** -0.25)
        return DeepNormConstants(0.81 * both, 0.87 / both), decoder
    layers = encoder_layers or decoder_layers
    if optimizer is None:
        return DeepNormConstants((2 * layers) ** 0.25, (8 * layers) ** -0.25)
    return DeepNormConstants(*((2 * layers) ** power for power in _OPTIMIZERS[optimizer]))


# What layers are called in widespread code; a name is the path of a layer in its module.
_SCALED = (
    r"(^|\.)(v|v_?proj|value|value_proj|v_lin|to_v|w_?v)$",  # values
    r"(^|\.)(o_?proj|out_?proj|out_lin|to_out(\.0)?|w_?o|c_proj)$",  # outputs of attention
    r"(^|\.)(attention|attn)\.(output\.|out\.)?(dense|proj|output)$",
    r"(^|\.)(fc_?[12]|linear_?[12]|lin_?[12]|w_?[123]|wi(_[01])?|c_fc|(gate|up|down)_proj|gate_up_proj"
    r"|(intermediate|output)\.dense|dense_(h_to_4h|4h_to_h))$",
    r"(^|\.)(mlp|ffn|ff|feed_?forward)\.([a-z_]*\.)*(\d+|net\.\d+(\.proj)?|(c|up|down|in|out)(_proj)?|proj_(in|out))$",
)
_PACKED = r"(^|\.)(w?qkv|c_attn|query_key_value|qkv_proj|in_proj|to_qkv|to_kv|kv_?proj)$"


def deepnorm_init_(module: nn.Module, beta: float, *, patterns: Iterable[str] | None = None) -> list[str]:
    """Multiplies by beta the initial matrices of values, of attention's outputs and of feed-forward networks.

    Queries, keys, biases, norms and embeddings stay as they are. Call it once, after the weights have their usual
    initial values (Xavier's in the paper) and before the training; a second call scales a second time.

    Found are, anywhere inside ``module``:

    * `torch.nn.MultiheadAttention`: the rows of values in its packed projection, and the output;
    * `torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer`: the feed-forward network too;
    * :class:`supy.nn.GatedAttentionUnit` and :class:`supy.nn.MixedChunkAttention`: the rows of u and v, and the output;
      the rows of z, which become queries and keys, stay. With three matrices in a row instead of two, give the root of
      the paper's beta, as :class:`supy.nn.DeepEncoder` does;
    * :class:`supy.nn.DeepEncoder`'s layers;
    * layers of other modules by the name they have in widespread code: ``v_proj``, ``value``, ``out_proj``, ``fc1``,
      ``attention.output.dense``, ``mlp.0`` and so on.

    Args:
        module: changed in place. A weight that occurs twice is scaled once.
        beta: of :func:`deepnorm_constants`.
        patterns: regular expressions instead of the names and the kinds of module above: every weight of at least two
            axes in whose full name (``layers.0.mix.weight``) one of them is found is scaled, whole.

    Returns:
        what was scaled: the full name of each weight, with its rows where it was not scaled whole.

    Raises:
        ValueError: beta is not above 0; nothing matches; a pattern matches nothing; or, without patterns, a layer's
            name says that it packs queries, keys and values, in an order that only its author knows.

    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    >>> for name in deepnorm_init_(layer, 0.5):
    ...     print(name)
    self_attn.in_proj_weight[16:24]
    self_attn.out_proj.weight
    linear1.weight
    linear2.weight
    """
    op = "deepnorm_init_"
    if not isinstance(module, nn.Module):
        raise TypeError(f"supy.{op}: module is a {type(module).__name__}, expected a torch.nn.Module")
    require(0 < beta < float("inf"), op, f"beta is {beta}, expected a number above 0")
    parts = _by_kind(module) if patterns is None else _by_pattern(module, list(patterns))
    scaled: dict[tuple[int, int], str] = {}
    with torch.no_grad():
        for name, weight, rows in parts:
            start, stop, _ = (rows or slice(None)).indices(len(weight))
            if (id(weight), start) not in scaled:
                weight[start:stop].mul_(beta)
                scaled[id(weight), start] = f"{name}[{start}:{stop}]" if rows else name
    return list(scaled.values())


def _by_pattern(module, patterns):
    weights = [(name, weight) for name, weight in module.named_parameters() if weight.ndim >= 2]
    for pattern in patterns:
        found = any(re.search(pattern, name) for name, _ in weights)
        require(found, "deepnorm_init_", f"no weight of {type(module).__name__} has a name with {pattern!r} in it")
    require(bool(patterns), "deepnorm_init_", "patterns is empty, expected regular expressions")
    return [(name, weight, None) for name, weight in weights if any(re.search(p, name) for p in patterns)]


def _by_kind(module) -> list[tuple[str, nn.Parameter, slice | None]]:
    parts, done = [], None
    for name, part in module.named_modules():  # a module comes right before what is in it
        if done is not None and name.startswith(done):
            continue
        at = f"{name}." if name else ""
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.MultiheadAttention):
            done = at
            dim = part.embed_dim
            if part.in_proj_weight is not None:
                parts.append((f"{at}in_proj_weight", part.in_proj_weight, slice(2 * dim, 3 * dim)))
            else:
                parts.append((f"{at}v_proj_weight", part.v_proj_weight, None))
            parts.append((f"{at}out_proj.weight", part.out_proj.weight, None))
        elif isinstance(part, (GatedAttentionUnit, MixedChunkAttention)):
            done = at
            parts.append((f"{at}project_in.weight", part.project_in.weight, slice(0, 2 * part.sizes[0])))
            parts.append((f"{at}project_out.weight", part.project_out.weight, None))
        elif getattr(part, "value_rows", None) is not None:  # attention of supy.nn.DeepEncoder
            done = at
            parts.append((f"{at}in_proj.weight", part.in_proj.weight, part.value_rows))
            parts.append((f"{at}out_proj.weight", part.out_proj.weight, None))
        elif "weight" in own and own["weight"].ndim >= 2:
            require(
                not re.search(_PACKED, name, re.IGNORECASE),
                "deepnorm_init_",
                f"{name} of {type(module).__name__} packs queries, keys and values, in an unknown order: "
                "scale its part of the values yourself and give patterns for the other weights",
            )
            if any(re.search(pattern, name, re.IGNORECASE) for pattern in _SCALED):
                parts.append((f"{at}weight", part.weight, None))
    message = (f"no value, output or feed-forward weight was found in {type(module).__name__}: "
               "expected modules or names that it knows, or patterns")  # fmt: skip
    require(bool(parts), "deepnorm_init_", message)
    return parts
