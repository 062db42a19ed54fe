"""What is timed: one row an operator and a size. Adding an operator to the benchmarks adds a row here and nothing else.

A row names its implementations, "supy" first; every one gets the same inputs and must return what the first function of
``exact`` returns on float64 copies of them. A peer imports its package inside its function: where the package is
missing, it is skipped with a note. `torch.compile` of a function is one more implementation: ``compiled(function)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import deep_norm
import diffusion_steps
import gated_attention
import graphs
import labels
import mixed_chunk
import pointers
import torch

import supy
from supy import _extension
from supy.reference.rotary import rotary as rotary_reference


@dataclass(frozen=True)
class Row:
    operator: str
    case: str  # shape, dtype, what is special
    inputs: Callable[[], tuple]
    implementations: dict[str, Callable]
    exact: Callable | None = None  # None: there is no result to compare
    bytes: int = 0  # read and written at the least: inputs once, outputs once
    flops: int = 0
    dtype: torch.dtype = torch.float32  # of the matrix products that these operations are
    same: Callable | None = None  # same(result, expected) -> bool; None: one tensor, within a tolerance
    unlike: tuple[str, ...] = ()  # implementations of something close, which are timed and not compared
    gradients: bool = False  # whether autograd records; the functions ask for their gradients themselves


FLOATS = torch.float32, torch.bfloat16


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# --- rotary -----------------------------------------------------------------------------------------------------------


def _rotary_inputs(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    angle = torch.outer(torch.arange(shape[-2]), 10000.0 ** (-torch.arange(0, shape[-1], 2).double() / shape[-1]))
    return x, angle.cos().float(), angle.sin().float()


def _rotate_half(x, cosine, sine):  # as Hugging Face's models write it
    a, b = x.chunk(2, -1)
    cosine, sine = (torch.cat((part, part), -1).to(x.dtype) for part in (cosine, sine))
    return x * cosine + torch.cat((-b, a), -1) * sine


@functools.cache
def _rotary_embedding(length, dim, device):
    from rotary_embedding_torch import RotaryEmbedding

    peer = RotaryEmbedding(dim).to(device)
    peer.rotate_queries_or_keys(torch.zeros(1, length, dim, device=device))  # its table in float32, not bfloat16
    return peer


def _rotary_row(shape, dtype, interleaved):
    def eager(x, cosine, sine):
        return rotary_reference(x, cosine, sine, interleaved, False)

    peers = {
        True: {"rotary-embedding-torch": lambda x, *_: _rotary_embedding(*x.shape[-2:], x.device).rotate_queries_or_keys(x)},
        False: {"rotate_half": _rotate_half, "rotate_half compiled": compiled(_rotate_half)},
    }
    numel = functools.reduce(int.__mul__, shape)
    return Row(
        "rotary",
        f"{list(shape)} {str(dtype)[6:]} {'interleaved' if interleaved else 'halves'}",
        lambda: _rotary_inputs(shape, dtype),
        {
            "supy": lambda x, *_: supy.ops.rotary(x, interleaved=interleaved),
            "eager": eager,
            "torch.compile": compiled(eager),
            **peers[interleaved],
        },
        exact=eager,
        bytes=2 * numel * dtype.itemsize + 4 * shape[-2] * shape[-1],
        flops=3 * numel,
    )


# --- gated attention ---------------------------------------------------------------------------------------------------


def _gated_attention_row(T, kernel="softmax_plus", *, causal=False, training=True, dtype=torch.float32):
    make = gated_attention.backward if training else gated_attention.forward
    plain = gated_attention.eager(kernel, causal)
    layers = gated_attention.layers(kernel, causal, training)
    return Row(
        "gated_attention_unit",
        f"[8, {T}, 768] {str(dtype)[6:]} {kernel}{' causal' if causal else ''}, {'with gradients' if training else 'forward'}",
        lambda: gated_attention.inputs(T, dtype),
        {**layers, "torch.compile": make(compiled(plain))},
        exact=make(plain),
        unlike=("FLASH-pytorch",),
        flops=gated_attention.flops(T, causal, training),
        dtype=dtype,
        gradients=training,
    )


def _mixed_chunk_row(T, training, dtype=torch.float32):
    layers = {name: both[training] for name, both in mixed_chunk.LAYERS.items()}
    name = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
    if name:
        del layers["FLASH-pytorch"]
    make = mixed_chunk.backward if training else mixed_chunk.forward
    D, S, E, c = mixed_chunk.DIM, mixed_chunk.KEYS, mixed_chunk.VALUES, mixed_chunk.CHUNK
    a_token = D * (2 * E + S) + E * D + c / 2 * (S + E) + 2 * S * E  # multiply-adds, forward
    return Row(
        "mixed_chunk_layer",
        f"[1, {T}, {D}]{name} causal, {'with gradients' if training else 'forward'}",
        lambda: mixed_chunk.inputs(T, dtype),
        {**layers, "torch.compile": make(compiled(mixed_chunk.eager))},
        exact=layers["eager"],
        flops=int(2 * T * a_token * (3 if training else 1)),
        dtype=dtype,
        gradients=training,
    )


# --- diffusion --------------------------------------------------------------------------------------------------------


def _normal_row(count):
    return Row(
        "philox_normal",
        f"[{count}] float32",
        lambda: (torch.empty(count),),
        {
            "supy": lambda out: supy.ops.philox_normal(count, 7),
            "supy out=": lambda out: supy.ops.philox_normal(count, 7, out=out),
            "torch.randn": lambda out: torch.randn(count, device=out.device),
            "normal_": lambda out: out.normal_(),
        },
        bytes=4 * count,
    )


def _diffusion_row(operator, case, batch, implementations, exact, tensors, unlike=()):
    return Row(
        operator,
        f"[{batch}, 3, 128, 128] float32, {case}",
        lambda: diffusion_steps.inputs(batch),
        implementations,
        exact=exact,
        bytes=tensors * 4 * batch * 3 * 128 * 128,
        unlike=unlike,
    )


def _diffusion_rows(batch):
    d = diffusion_steps
    others = {"in place, normal_": d.ddpm_by_hand, "diffusers": d.diffusers_ddpm}
    others |= {"posterior, randn": d.ddpm_by_posterior}
    steps = {"supy": d.ddpm, "supy out=": d.ddpm_in_place} | others
    yield _diffusion_row("ddpm_step", "noise, clipped", batch, steps, d.ddpm_exact, 3, tuple(others))
    plain = {"eager": d.ddim_plain, "torch.compile": compiled(d.ddim_plain), "diffusers": d.diffusers_ddim}
    yield _diffusion_row("ddim_step", "eta = 0", batch, {"supy": d.ddim} | plain, d.ddim_plain, 3)
    plain = {"eager": d.add_noise_plain, "torch.compile": compiled(d.add_noise_plain)}
    plain |= {"diffusers": d.diffusers_add_noise}
    yield _diffusion_row("ddpm_add_noise", "noise given", batch, {"supy": d.add_noise} | plain, d.add_noise_plain, 3)


# --- deep_norm --------------------------------------------------------------------------------------------------------


def _deep_norm_row(rows, width, dtype, training):
    make = deep_norm.with_gradients if training else deep_norm.forward
    functions = {"supy": deep_norm.ours, "supy, Triton": deep_norm.triton, "eager": deep_norm.eager}
    functions |= {"add(alpha)": deep_norm.fused, "torch.compile": compiled(deep_norm.fused)}
    functions |= {"Liger-Kernel": deep_norm.liger}
    return Row(
        "deep_norm",
        f"[{rows}, {width}] {str(dtype)[6:]}, {'with gradients' if training else 'forward'}",
        lambda: deep_norm.inputs(rows, width, dtype),
        {name: make(function) for name, function in functions.items()},
        exact=make(deep_norm.eager),
        bytes=(7 if training else 3) * rows * width * dtype.itemsize,
        same=deep_norm.same,
        # Their gradient of the weight is a sum in bfloat16, or of a z that was rounded to it.
        unlike=tuple(functions)[2:] if training and dtype == torch.bfloat16 else (),
        gradients=training,
    )


def _deep_norm_rows(*sizes):
    for rows, width in sizes:
        yield from (_deep_norm_row(rows, width, dtype, training) for dtype in FLOATS for training in (False, True))


# --- the cost of a call -----------------------------------------------------------------------------------------------


def _tiny():
    return _rotary_inputs((1, 1, 2, 4), torch.float32)


def _touch(x, y, *_):
    if _extension.C is None:
        raise ImportError(_extension.missing)
    return _extension.C.touch(x, y)


CALL_ROW = Row(
    "call overhead",
    "tiny tensors, nothing to compute",
    _tiny,
    {
        "supy": lambda x, *_: supy.ops.rotary(x),
        "operator alone": lambda x, c, s: torch.ops.supy.rotary(x, c, s, True, False),
        "binding alone": _touch,
        "eager": lambda x, c, s: rotary_reference(x, c, s, True, False),
        "torch.add": lambda x, *_: x + x,
    },
)


# --- cliques ----------------------------------------------------------------------------------------------------------


def _same_cliques(result, expected):
    return graphs.summary(result) == graphs.summary(expected)


def _igraph(edges, nodes):
    return graphs.igraph_of(edges, nodes).maximal_cliques()


def _networkx(edges, nodes):
    import networkx

    return list(networkx.find_cliques(graphs.networkx_of(edges, nodes)))


def _clique_row(case, inputs, peers=("igraph", "networkx")):
    """The graphs of the peers are built beforehand: only the search and its list of cliques are timed."""

    def prepared():
        edges, nodes = inputs()
        made = {"igraph": graphs.igraph_of, "networkx": graphs.networkx_of}
        return edges, nodes, {name: made[name](edges, nodes) for name in peers}

    search = {
        "igraph": lambda edges, nodes, made: made["igraph"].maximal_cliques(),
        "networkx": lambda edges, nodes, made: list(_networkx_cliques(made["networkx"])),
    }
    return Row(
        "maximal_cliques",
        case,
        prepared,
        {
            "supy": lambda edges, nodes, _: supy.ops.maximal_cliques(edges, nodes),
            **{name: search[name] for name in peers},
        },
        exact=search["igraph"],
        same=_same_cliques,
    )


def _networkx_cliques(graph):
    import networkx

    return networkx.find_cliques(graph)


# --- GlobalPointer ----------------------------------------------------------------------------------------------------


def _loss_row(form, B, T, H, dense=True):
    """The operations are those of the visible half of the products; without `dense` no peer's tensors fit in memory."""
    efficient = form == "efficient"
    scores = pointers.efficient_scores if efficient else pointers.full_scores
    theirs = pointers.bert4torch_efficient if efficient else pointers.bert4torch_full
    name = "efficient_global_pointer_loss" if efficient else "global_pointer_loss"
    ours = pointers.with_gradients(getattr(supy.ops, name))
    plain = "factorised, plain PyTorch" if efficient else "head by head, plain PyTorch"
    eager = pointers.with_gradients(pointers.dense(scores))
    implementations = {"supy": ours, plain: pointers.on_reference(ours)}
    if dense:
        implementations |= {
            "dense eager": eager,
            "dense torch.compile": pointers.with_gradients(compiled(pointers.dense(scores))),
            "bert4torch sparse": pointers.with_gradients(pointers.bert4torch_sparse(theirs)),
        }
    products = (3 * H + 3 * pointers.SIZE) if efficient else 3 * H * pointers.SIZE
    return Row(
        name,
        f"B={B} T={T} H={H} float32, loss and gradients",
        lambda: (pointers.efficient_inputs if efficient else pointers.full_inputs)(B, T, H),
        implementations,
        exact=eager if dense else None,
        same=pointers.same_gradients,
        flops=2 * B * T * (T + 1) // 2 * products,
        gradients=True,
    )


def _spans_row(form, B, T, H, trained=True, numpy=True):
    efficient = form == "efficient"
    scores = pointers.efficient_scores if efficient else pointers.full_scores
    theirs = pointers.bert4torch_efficient if efficient else pointers.bert4torch_full
    operator = supy.ops.efficient_global_pointer_spans if efficient else supy.ops.global_pointer_spans
    made = pointers.trained_efficient if efficient else pointers.trained_full
    untrained = pointers.efficient_inputs if efficient else pointers.full_inputs
    by_nonzero = pointers.by_nonzero(pointers.visible(scores))
    return Row(
        "efficient_global_pointer_spans" if efficient else "global_pointer_spans",
        f"B={B} T={T} H={H} float32, {'26 spans a sample' if trained else 'half of all cells'}",
        lambda: made(B, T, H) if trained else untrained(B, T, H)[:-1],
        {
            "supy": operator,
            "dense eager, nonzero": by_nonzero,
            "torch.compile, nonzero": pointers.by_nonzero(compiled(pointers.visible(scores))),
        }
        | ({"bert4torch, np.where": pointers.by_where(theirs)} if numpy else {}),
        exact=by_nonzero if trained else None,  # at random scores, one next to 0 may round to the other side
        same=pointers.same_spans,
        flops=2 * B * T * (T + 1) // 2 * (1 if efficient else H) * pointers.SIZE,
    )


# --- the multi-label losses ---------------------------------------------------------------------------------------------


def _labels_row(operator, case, inputs, supy_loss, plain, read, numel, flops):
    """Loss and gradient. The least traffic: all read for the loss, and again for the gradient, which needs the loss."""
    run = labels.value_and_gradient
    return Row(
        operator,
        case,
        inputs,
        {
            "supy": run(supy_loss),
            "formula eager": run(plain),
            "formula torch.compile": run(compiled(plain)),
        },
        exact=run(supy_loss),  # in float64: the reference
        same=labels.same,
        bytes=(2 * read + 4) * numel,
        flops=flops * numel,
        gradients=True,
    )


def _dense_row(rows, kind):
    shape = (*rows, 65536)

    def inputs():
        generator = torch.Generator().manual_seed(0)
        scores = 2 * torch.randn(shape, generator=generator) - 2
        targets = torch.rand(shape, generator=generator)
        return scores, {"bool": targets < 1e-3, "hard": (targets < 1e-3).float(), "soft": 0.1 * targets}[kind]

    names = {"bool": "bool targets", "hard": "float32 targets, hard", "soft": "float32 targets, soft"}
    return _labels_row(
        "multilabel_cross_entropy",
        f"{list(shape)} float32, {names[kind]}",
        inputs,
        supy.ops.multilabel_cross_entropy,
        labels.soft if kind == "soft" else labels.hard,
        4 + (1 if kind == "bool" else 4),
        functools.reduce(int.__mul__, shape),
        40,
    )


def _sparse_row(rows, positives):
    shape = (*rows, 65536)

    def inputs():
        generator = torch.Generator().manual_seed(0)
        scores = 2 * torch.randn(shape, generator=generator) - 2
        return scores, torch.rand(*rows, 65536, generator=generator).topk(positives).indices

    return _labels_row(
        "sparse_multilabel_cross_entropy",
        f"{list(shape)} float32, {positives} positives",
        inputs,
        supy.ops.sparse_multilabel_cross_entropy,
        functools.partial(supy.ops.sparse_multilabel_cross_entropy, form="published"),
        4,
        functools.reduce(int.__mul__, shape),
        40,
    )


def _tasks_row(shape, form):
    def inputs():
        generator = torch.Generator().manual_seed(0)
        scores = 2 * torch.randn(shape, generator=generator)
        return scores, scores.roll(1, -2).softmax(-1)

    return _labels_row(
        "multitask_cross_entropy",
        f"{list(shape)} float32, {form}",
        inputs,
        functools.partial(supy.ops.multitask_cross_entropy, form=form),
        {"hard": labels.tasks_hard, "soft": labels.tasks_soft}[form],
        8,
        functools.reduce(int.__mul__, shape),
        60,
    )


# --- the argmax of a linear layer ---------------------------------------------------------------------------------------


def _linear_inputs(M, K, size, dtype):
    weight = torch.randn(K, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return weight[:M].clone(), weight, torch.arange(M)


def _largest_logits(x, weight, own):
    """A product and its maximum in blocks of 1024 rows, which need 200 MB."""
    values = []
    for rows, exclude in zip(x.split(1024), own.split(1024)):
        logits = rows @ weight.T
        logits.scatter_(1, exclude[:, None], -torch.inf)
        values.append(logits.max(1).values)
    return torch.cat(values)


def _linear_row(M, K, size, dtype=torch.float32):
    return Row(
        "linear_argmax",
        f"[{M}, {K}, {size}] {str(dtype)[6:]}, own class excluded",
        lambda: _linear_inputs(M, K, size, dtype),
        {
            "supy": lambda x, weight, own: supy.ops.linear_argmax(x, weight, exclude=own)[0],
            "product and max": _largest_logits,
            "torch.compile": compiled(_largest_logits),
        },
        exact=_largest_logits,
        flops=2 * M * K * size,
        dtype=dtype,
    )


CPU_ROWS = [
    _rotary_row((16, 12, 512, 64), torch.float32, True),
    _rotary_row((16, 12, 512, 64), torch.bfloat16, True),
    _rotary_row((16, 12, 512, 64), torch.float32, False),
    _rotary_row((16, 12, 512, 64), torch.bfloat16, False),
    CALL_ROW,
    Row(
        "batched_maximal_cliques",
        "10,000 graphs of 2 to 12 nodes, graphs built",
        graphs.tiny,
        {
            "supy": lambda *batch: supy.ops.batched_maximal_cliques(*batch),
            "igraph": lambda *batch: graphs.each(*batch, _igraph),
            "networkx": lambda *batch: graphs.each(*batch, _networkx),
        },
        exact=lambda *batch: graphs.each(*batch, _networkx),
        same=_same_cliques,
    ),
    _clique_row("G(60, 0.9)", lambda: graphs.dense(60, 0.9), ("igraph",)),
    _clique_row("Moon-Moser 36", lambda: graphs.moon_moser(36), ("igraph",)),
    _clique_row("Moon-Moser 42", lambda: graphs.moon_moser(42), ("igraph",)),
    _clique_row("G(128, 0.6)", lambda: graphs.dense(128, 0.6), ("igraph",)),
    _clique_row("G(200, 0.3)", lambda: graphs.dense(200, 0.3)),
    _clique_row("random, 10^4 nodes", lambda: graphs.sparse(10**4, 5 * 10**4)),
    _clique_row("random, 10^5 nodes", lambda: graphs.sparse(10**5, 5 * 10**5)),
    _clique_row("attached, 10^4 nodes", lambda: graphs.attached(10**4, 8)),
    _clique_row("attached, 10^5 nodes", lambda: graphs.attached(10**5, 8)),
    _clique_row("geometric, 2 * 10^4 nodes", lambda: graphs.geometric(20_000, 392_000), ("igraph",)),
    _loss_row("efficient", 16, 128, 65),
    _loss_row("efficient", 16, 128, 217),
    _loss_row("efficient", 16, 512, 217, dense=False),
    _loss_row("full", 16, 128, 65),
    _loss_row("full", 16, 128, 217),
    _spans_row("efficient", 16, 128, 65),
    _spans_row("efficient", 16, 128, 217),
    _spans_row("efficient", 16, 128, 65, trained=False),
    _spans_row("full", 16, 128, 65),
    _spans_row("full", 16, 128, 217),
    _spans_row("full", 16, 128, 65, trained=False),
    _dense_row((16, 65), "bool"),
    _dense_row((16, 65), "hard"),
    _dense_row((4, 65), "soft"),
    _sparse_row((4, 65), 8),
    _tasks_row((16, 4096, 12), "hard"),
    _tasks_row((16, 4096, 12), "soft"),
    *(
        _gated_attention_row(T, training=training, dtype=dtype)
        for T in (512, 1024, 2048)
        for dtype in (torch.float32, torch.bfloat16)
        for training in (False, True)
    ),
    _gated_attention_row(1024, "relu2"),
    _gated_attention_row(2048, causal=True, training=False),
    _gated_attention_row(2048, causal=True),
    _gated_attention_row(2048, causal=True, dtype=torch.bfloat16),
    _mixed_chunk_row(4096, training=False),
    _mixed_chunk_row(4096, training=True),
    _mixed_chunk_row(16384, training=True),
    _mixed_chunk_row(4096, training=True, dtype=torch.bfloat16),
    _normal_row(2**24),
    *(row for batch in (1, 8, 64) for row in _diffusion_rows(batch)),
    *(_linear_row(4096, 50_000, size) for size in (16, 32, 64)),
    *(_linear_row(2048, 50_257, 768, dtype) for dtype in FLOATS),
    *(_deep_norm_row(rows, 768, torch.float32, training) for rows in (1, 512) for training in (False, True)),
    *_deep_norm_rows((8192, 768), (4096, 4096)),
]

CUDA_ROWS = [
    CALL_ROW,
    *(
        _gated_attention_row(T, training=training, dtype=torch.bfloat16)
        for T, training in ((512, True), (2048, False), (2048, True), (8192, False), (8192, True))
    ),
    _gated_attention_row(8192, causal=True, dtype=torch.bfloat16),
    _gated_attention_row(2048, "relu2", dtype=torch.bfloat16),
    _gated_attention_row(2048),
    _mixed_chunk_row(16384, training=True),
    *(_mixed_chunk_row(T, training=True, dtype=torch.bfloat16) for T in (16384, 65536)),
    *(_loss_row(form, 16, T, 65) for form in ("efficient", "full") for T in (128, 512)),
    *(_spans_row(form, 16, T, 65, numpy=False) for form in ("efficient", "full") for T in (128, 512)),
    *(_deep_norm_row(16384, 4096, dtype, training=True) for dtype in FLOATS),
    *(_rotary_row((16, 16, 4096, 128), dtype, interleaved) for dtype, interleaved in zip(FLOATS, (False, True))),
    _dense_row((16, 65), "bool"),
    _dense_row((4, 65), "soft"),
    _sparse_row((16, 65), 8),
    _tasks_row((64, 4096, 12), "hard"),
    _linear_row(16384, 151_936, 4096, torch.bfloat16),
    _linear_row(16384, 50_257, 768),
    _normal_row(2**28),
    *(row for batch in (64, 1024) for row in _diffusion_rows(batch)),
]
# A new operator's rows go into both lists. A peer of its own is one more function in the dict.
ROWS = {"cpu": CPU_ROWS, "cuda": CUDA_ROWS}
