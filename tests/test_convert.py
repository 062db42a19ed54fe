"""Converted modules give the scores of the published layers, which are computed here once more in NumPy.

Both layers are written down from their descriptions (kexue.fm posts 8373, 8877 and 8265): rotary positions as a product
with sines and cosines of each pair, weights in the published layout, one loop a head.
"""

import math

import numpy as np
import pytest
import torch

from supy.nn import (
    EfficientGlobalPointer,
    GatedAttentionUnit,
    GlobalPointer,
    load_bert4keras_,
    load_bert4torch_,
)

DIM, HEADS, SIZE, TOKENS = 10, 3, 6, 7
LENGTHS = [7, 4]


def rotate(x):
    """x `[T, D]`: the pair (x_2i, x_2i+1) of token t turns by t / 10000^(2i / D)."""
    out = np.empty_like(x)
    for t in range(x.shape[0]):
        for i in range(0, x.shape[1], 2):
            angle = t * 10000.0 ** (-i / x.shape[1])
            sine, cosine = math.sin(angle), math.cos(angle)
            out[t, i] = x[t, i] * cosine - x[t, i + 1] * sine
            out[t, i + 1] = x[t, i + 1] * cosine + x[t, i] * sine
    return out


def scale_and_mask(products, biases, length, tril):
    """products, biases `[T, T]`: the scores of one head of one sample."""
    scores = products / math.sqrt(SIZE) + biases
    for i in range(TOKENS):
        for j in range(TOKENS):
            if max(i, j) >= length or (tril and i > j):
                scores[i, j] = -math.inf
    return scores


def full(x, kernel, bias, rotary, tril, length):
    """One sample `[T, DIM]`, kernel `[in, out]`: head by head D channels of q, then D of k, in both libraries."""
    both = x @ kernel + bias
    scores = []
    for h in range(HEADS):
        group = both[:, 2 * SIZE * h : 2 * SIZE * (h + 1)]
        q, k = group[:, :SIZE], group[:, SIZE:]
        if rotary:
            q, k = rotate(q), rotate(k)
        scores.append(scale_and_mask(q @ k.T, 0.0, length, tril))
    return scores


def efficient(x, p, p_bias, q, q_bias, rotary, tril, length, keras):
    """As `full`; p and q are the kernels of the two dense layers."""
    both = x @ p + p_bias
    outputs = (both @ q + q_bias) / 2
    queries, keys = (both[:, 0::2], both[:, 1::2]) if keras else (both[:, :SIZE], both[:, SIZE:])
    if rotary:
        queries, keys = rotate(queries), rotate(keys)
    scores = []
    for h in range(HEADS):
        even, odd = outputs[:, 2 * h], outputs[:, 2 * h + 1]
        start, end = (odd, even) if keras else (even, odd)
        scores.append(
            scale_and_mask(queries @ keys.T, start[:, None] + end[None, :], length, tril)
        )
    return scores


OPTIONS = pytest.mark.parametrize(
    "rotary, tril, bias", [(True, True, True), (False, True, True), (True, False, False)]
)
LAYOUTS = pytest.mark.parametrize("layout", ["bert4keras", "bert4torch"])
SHAPES = {GlobalPointer: [(DIM, HEADS * 2 * SIZE)], EfficientGlobalPointer: [(DIM, 2 * SIZE), (2 * SIZE, 2 * HEADS)]}
NAMES = {GlobalPointer: ["dense"], EfficientGlobalPointer: ["p_dense", "q_dense"]}


def random_layers(Module, bias, seed=0):
    """A kernel `[in, out]` and a bias a layer, and what the two libraries would hand out of them."""
    random = np.random.default_rng(seed)
    layers = [(random.normal(size=shape), random.normal(size=shape[1]) * bias) for shape in SHAPES[Module]]
    keras = [array for layer in layers for array in layer[: 1 + bias]]
    state = {}
    for name, (kernel, offset) in zip(NAMES[Module], layers):
        state[f"{name}.weight"] = torch.from_numpy(kernel.T)
        if bias:
            state[f"{name}.bias"] = torch.from_numpy(offset)
    return [array for layer in layers for array in layer], keras, state


def module(Module, **options):
    return Module(DIM, HEADS, head_size=SIZE, **options).double()


def assert_same_scores(pointer, hidden, expected):
    scores = pointer.scores(torch.from_numpy(hidden), lengths=torch.tensor(LENGTHS))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.from_numpy(np.array(expected)), rtol=1e-12, atol=1e-12)


@LAYOUTS
@OPTIONS
def test_global_pointer(layout, rotary, tril, bias):
    arrays, keras, state = random_layers(GlobalPointer, bias)
    pointer = module(GlobalPointer, rotary=rotary, tril=tril, bias=bias)
    loaded = load_bert4keras_(pointer, keras) if layout == "bert4keras" else load_bert4torch_(pointer, state)
    assert loaded is pointer
    hidden = np.random.default_rng(1).normal(size=(2, TOKENS, DIM))
    assert_same_scores(
        pointer, hidden, [full(x, *arrays, rotary, tril, n) for x, n in zip(hidden, LENGTHS)]
    )


@LAYOUTS
@OPTIONS
def test_efficient_global_pointer(layout, rotary, tril, bias):
    arrays, keras, state = random_layers(EfficientGlobalPointer, bias)
    pointer = module(EfficientGlobalPointer, rotary=rotary, tril=tril, bias=bias)
    loaded = load_bert4keras_(pointer, keras) if layout == "bert4keras" else load_bert4torch_(pointer, state)
    assert loaded is pointer
    hidden = np.random.default_rng(1).normal(size=(2, TOKENS, DIM))
    expected = [
        efficient(x, *arrays, rotary, tril, n, layout == "bert4keras") for x, n in zip(hidden, LENGTHS)
    ]
    assert_same_scores(pointer, hidden, expected)


@pytest.mark.parametrize("Module", [GlobalPointer, EfficientGlobalPointer])
def test_arrays_and_tensors_of_any_float_dtype_fill_a_module_of_any_dtype(Module):
    _, keras, state = random_layers(Module, True)
    expected = load_bert4keras_(module(Module), [array.astype("f4") for array in keras]).float().state_dict()
    as_tensors = [torch.from_numpy(array.astype("f4")) for array in keras]
    loaded = load_bert4keras_(module(Module).float(), as_tensors).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    as_arrays = {name: value.float().numpy() for name, value in state.items()}
    one, two = module(Module), module(Module)
    load_bert4torch_(one, as_arrays)
    load_bert4torch_(two, {name: value.float() for name, value in state.items()})
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())
    assert all(parameter.requires_grad for parameter in one.parameters())


def test_a_layer_inside_the_state_of_a_model():
    _, _, state = random_layers(EfficientGlobalPointer, True)
    inside = {f"pointer.{name}": value for name, value in state.items()}
    inside |= {"bert.weight": torch.zeros(3), "pointer.position_embedding.cos_position": torch.zeros(4)}
    one, two = module(EfficientGlobalPointer), module(EfficientGlobalPointer)
    load_bert4torch_(one, inside, prefix="pointer.")
    load_bert4torch_(two, state)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())


ONE = np.ones
BAD = [
    (load_bert4keras_, [ONE((DIM, 36))], ValueError, "weights has 1 arrays, expected 2: dense.weight, dense.bias"),
    (load_bert4keras_, [ONE((36, DIM)), ONE(36)], ValueError, r"weights\[0\] .* shape \[36, 10\], expected \[10, 36\]"),
    (load_bert4keras_, [ONE((DIM, 36)), ONE(35)], ValueError, r"dense.bias\) has shape \[35\], expected \[36\]"),
    (load_bert4keras_, [ONE((DIM, 36), int), ONE(36)], TypeError, "dtype torch.int64, expected a floating"),
    (load_bert4keras_, [object(), ONE(36)], TypeError, r"weights\[0\] .* is a object"),
    (load_bert4keras_, b"cos\nsystem\n", TypeError, "weights is a bytes"),
    (load_bert4torch_, {"dense.weight": ONE((36, DIM))}, ValueError, "missing: dense.bias; unknown: none"),
    (load_bert4torch_, {"p_dense.weight": ONE((12, DIM))}, ValueError, "missing: dense.bias, .*unknown: p_dense"),
    (load_bert4torch_, {"dense.weight": ONE((DIM, 36)), "dense.bias": ONE(36)}, ValueError, "expected .36, 10."),
    (load_bert4torch_, {"dense.weight": ONE((36, DIM)), "dense.bias": "x"}, TypeError, "dense.bias is a str"),
    (load_bert4torch_, [ONE((36, DIM)), ONE(36)], TypeError, "weights is a list, expected names and arrays"),
]


@pytest.mark.parametrize("load, weights, error, message", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(load, weights, error, message):
    pointer = module(GlobalPointer)
    before = {name: value.clone() for name, value in pointer.state_dict().items()}
    with pytest.raises(error, match=f"supy.{load.__name__}: .*{message}"):
        load(pointer, weights)
    assert all(torch.equal(value, before[name]) for name, value in pointer.state_dict().items())


@pytest.mark.parametrize("load, weights", [(load_bert4keras_, []), (load_bert4torch_, {})])
def test_other_modules_are_refused(load, weights):
    with pytest.raises(TypeError, match="pointer is a GatedAttentionUnit"):
        load(GatedAttentionUnit(8, key_size=4), weights)
