"""GAU-alpha from checkpoints of every published kind, against the whole model computed once more in NumPy.

The checkpoints are synthetic, at a small size, with the published names and shapes.
"""

import base64
import json
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from _rotate import rotate
from supy.models import GAUAlpha, GAUAlphaConfig
from supy.models._tensorflow import read_checkpoint

VOCAB, DIM, VALUE, KEY, LAYERS = 50, 12, 20, 8, 3
CONFIG = GAUAlphaConfig(VOCAB, 2, DIM, VALUE, KEY, LAYERS)
IDS = torch.tensor(np.random.default_rng(1).integers(0, VOCAB, (3, 21)))
SEGMENTS = (torch.arange(21) > 9).long().expand(3, 21)
LENGTHS = torch.tensor([21, 17, 5])  # the last below the 16 keys at which softmax_plus stops


def variables(seed=0):
    """The TensorFlow model's arrays by name, in the order of Keras."""
    random = np.random.default_rng(seed)
    shapes = {"bert/embeddings/word_embeddings": (VOCAB, DIM), "bert/embeddings/token_type_embeddings": (2, DIM)}
    for i in range(LAYERS):
        layer = f"GAU_alpha/encoder/layer_{i}/gau/"
        shapes |= {layer + "i_dense/kernel": (DIM, 2 * VALUE + KEY), layer + "q_scaleoffset/gamma": (KEY,)}
        shapes |= {layer + "k_scaleoffset/gamma": (KEY,), layer + "o_dense/kernel": (VALUE, DIM)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def port(arrays, prefix="gau_alpha."):
    """The same as the public PyTorch port names and turns them."""
    tensors = {}
    for name, array in arrays.items():
        name = name.replace("bert/", "").replace("GAU_alpha/", "").replace("layer_", "layer.").replace("/", ".")
        if name.endswith(".kernel"):
            array = array.T
        name = name.removesuffix(".kernel").removesuffix(".gamma") + ".weight"
        tensors[prefix + name] = torch.tensor(np.ascontiguousarray(array))
    return tensors


def rms(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-7)


def numpy_model(arrays, ids, segments, length):
    """Hidden states and logits of one sample's valid tokens, in float64."""
    p = {name: array.astype(np.float64) for name, array in arrays.items()}
    tokens = p["bert/embeddings/word_embeddings"]
    x = rms(tokens[ids[:length]] + p["bert/embeddings/token_type_embeddings"][segments[:length]])
    for i in range(LAYERS):
        layer = f"GAU_alpha/encoder/layer_{i}/gau/"
        y = x @ p[layer + "i_dense/kernel"]
        y = y / (1 + np.exp(-y))
        u, v, z = y[:, :VALUE], y[:, VALUE : 2 * VALUE], y[:, 2 * VALUE :]
        q, k = rotate(z * p[layer + "q_scaleoffset/gamma"]), rotate(z * p[layer + "k_scaleoffset/gamma"])
        scores = q @ k.T / math.sqrt(KEY) * math.log(max(length, 16)) / math.log(512)
        a = np.exp(scores - scores.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        x = rms(x + (u * (a @ v)) @ p[layer + "o_dense/kernel"])
    return x, x @ tokens.T


def assert_is_the_model(model, arrays):
    assert not model.training
    model = model.double()
    hidden = model.encode(IDS, SEGMENTS, lengths=LENGTHS)
    logits = model(IDS, SEGMENTS, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        expected = numpy_model(arrays, IDS[b].numpy(), SEGMENTS[b].numpy(), length)
        for ours, theirs in zip((hidden, logits), expected, strict=True):
            # float64 on both sides; what is left is the order of sums, 1e-16 times the depth of the network.
            np.testing.assert_allclose(ours[b, :length].detach().numpy(), theirs, rtol=1e-9, atol=1e-9)


def test_default_size_is_the_published_one():
    with torch.device("meta"):
        model = GAUAlpha()
    assert sum(parameter.numel() for parameter in model.parameters()) == 96_517_632
    assert model.units[0].project_in.weight.shape == (3200, 768) and len(model.units) == 24


def test_tensorflow_names():
    arrays = variables()
    assert_is_the_model(GAUAlpha(CONFIG).eval().load_tensorflow_(arrays), arrays)


def test_keras_weights_in_either_order():
    arrays = variables()
    new, old = list(arrays.values()), []
    for i in range(2, len(new), 4):
        old += [new[i], new[i + 3], new[i + 1], new[i + 2]]
    for weights in (new, new[:2] + old):
        assert_is_the_model(GAUAlpha(CONFIG).eval().load_tensorflow_(weights), arrays)
    with pytest.raises(ValueError, match="variables has 13 arrays, expected 14"):
        GAUAlpha(CONFIG).load_tensorflow_(new[1:])


@pytest.mark.parametrize("prefix", ["gau_alpha.", ""])
def test_folder_of_the_pytorch_port(tmp_path, prefix):
    arrays = variables()
    config = {"model_type": "gau_alpha", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": VALUE}
    config |= {"attention_key_size": KEY, "num_hidden_layers": LAYERS, "hidden_act": "swish", "use_bias": False}
    config |= {"normalization": "softmax_plus", "layer_norm_eps": 1e-7, "embedding_size": DIM, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = port(arrays, prefix)
    state["cls.predictions.decoder.weight"] = state[f"{prefix}embeddings.word_embeddings.weight"].clone()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_is_the_model(GAUAlpha.from_pretrained(tmp_path), arrays)

    state["cls.predictions.decoder.weight"][3, 4] += 1
    with pytest.raises(ValueError, match="cls.predictions.decoder.weight has other values than gau_alpha.embeddings"):
        GAUAlpha(CONFIG).load_pytorch_(state)
    for name, value in (("hidden_act", "gelu"), ("use_bias", True), ("embedding_size", 5), ("model_type", "bert")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"config.json has {name} {value!r}, expected"):
            GAUAlpha.from_pretrained(tmp_path)


def test_saved_folder_is_read_again(tmp_path):
    arrays = variables()
    (tmp_path / "vocab.txt").write_text("[PAD]")
    model = GAUAlpha(CONFIG).load_tensorflow_(arrays)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gau_alpha"
    again = GAUAlpha.from_pretrained(tmp_path)
    assert again.config == CONFIG
    assert_is_the_model(again, arrays)


def test_safetensors_without_prefix(tmp_path):
    arrays = variables()
    save_file(port(arrays, ""), tmp_path / "a.safetensors")
    assert_is_the_model(GAUAlpha(CONFIG).eval().load_pytorch_(tmp_path / "a.safetensors"), arrays)


# TensorFlow's files are written here as its sources describe them; the first test below has bytes of TensorFlow's own.


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if (crc ^ byte >> bit) & 1 else 0)
    return crc ^ 0xFFFFFFFF


def block(entries, place):
    """The bytes of a block with checksum, and its handle."""
    body, before = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(key, before)) if a != b), min(len(key), len(before)))
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    body += struct.pack("<II", 0, 1)
    crc = crc32c(body + b"\0")
    masked = ((crc >> 15) + (crc << 17) + 0xA282EAD8) % 2**32
    return body + b"\0" + struct.pack("<I", masked), varint(place) + varint(len(body))


def write_checkpoint(prefix, arrays, shards=2):
    data = [b""] * shards
    entries = [(b"", b"\x08" + varint(shards) + b"\x1a\x02\x08\x01")]
    for number, (name, array) in enumerate(sorted(arrays.items())):
        shard = number % shards
        shape = b"".join(b"\x12" + varint(len(d) + 1) + b"\x08" + d for d in map(varint, array.shape))
        entry = b"\x08\x01\x12" + varint(len(shape)) + shape
        entry += b"\x18" + varint(shard) + b"\x20" + varint(len(data[shard])) + b"\x28" + varint(array.nbytes)
        entries.append((name.encode(), entry + b"\x35" + struct.pack("<I", 0)))
        data[shard] += array.tobytes()
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}").write_bytes(content)
    table, index = b"", []
    for i in range(0, len(entries), 5):  # several blocks
        content, handle = block(entries[i : i + 5], len(table))
        table += content
        index.append((entries[min(i + 4, len(entries) - 1)][0], handle))
    content, meta = block([], len(table))
    table += content
    content, handle = block(index, len(table))
    footer = (meta + handle).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    prefix.with_name(prefix.name + ".index").write_bytes(table + content + footer)


# "h", bfloat16 [2]; "i", float16 [1, 2]; "s", float64 []: written by TensorFlow 2.21.
INDEX = (
    "AAAGCAEaAggBAAEPaAgOEgQSAggCKAQ1kkWl2wABFWkIExIIEgIIARICCAIgBCgENQzN8dIAAQ1zCAISACAIKAg16SwpnAAAAAABAAAAAOR6vz"
    "kAAAAAAQAAAADA8qGwAAECdABOAAAAAAEAAAAAlCnVelMIYA4AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABX+4CLJHVH2w=="
)
DATA = "wD8AQAA+AEAAAAAAAAAcQA=="


def test_checkpoint_that_tensorflow_wrote(tmp_path):
    (tmp_path / "a.index").write_bytes(base64.b64decode(INDEX))
    (tmp_path / "a.data-00000-of-00001").write_bytes(base64.b64decode(DATA))
    read = read_checkpoint(tmp_path / "a")
    assert list(read) == ["h", "i", "s"]
    assert torch.equal(read["h"], torch.tensor([1.5, 2], dtype=torch.bfloat16))
    assert torch.equal(read["i"], torch.tensor([[1.5, 2]], dtype=torch.float16))
    assert torch.equal(read["s"], torch.tensor(7, dtype=torch.float64))


def test_tensorflow_folder(tmp_path):
    arrays = variables()
    config = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": VALUE, "attention_key_size": KEY}
    (tmp_path / "bert_config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    write_checkpoint(tmp_path / "bert_model.ckpt", arrays)
    assert_is_the_model(GAUAlpha.from_pretrained(tmp_path), arrays)


def test_damaged_tensorflow_files(tmp_path):
    write_checkpoint(tmp_path / "a", variables(), shards=1)
    index, data = tmp_path / "a.index", tmp_path / "a.data-00000-of-00001"
    whole = index.read_bytes()
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"bert/embeddings/word_embeddings has shape \[50, 12\] and 2400 bytes"):
        read_checkpoint(tmp_path / "a")
    data.unlink()
    with pytest.raises(ValueError, match="a.data-00000-of-00001 does not exist"):
        read_checkpoint(tmp_path / "a")
    for content in (b"", whole[:-1], whole[1:], whole[:100] + b"\xff" + whole[101:], b"\0" * 4 + whole[4:]):
        index.write_bytes(content)
        with pytest.raises(ValueError, match="a.index is no TensorFlow checkpoint"):
            read_checkpoint(tmp_path / "a")
    random = np.random.default_rng(0)
    for _ in range(200):  # whatever is broken, one error
        broken = bytearray(whole)
        broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        index.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="^supy.GAUAlpha: "):
            read_checkpoint(tmp_path / "a")
    index.unlink()
    with pytest.raises(ValueError, match="a.index does not exist"):
        read_checkpoint(tmp_path / "a")


NAME = "GAU_alpha/encoder/layer_1/gau/o_dense/kernel"


@pytest.mark.parametrize("form", ["tensorflow", "pytorch"])
def test_variable_that_does_not_fit_is_named_and_nothing_is_set(form):
    model = GAUAlpha(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = NAME if form == "tensorflow" else "gau_alpha.encoder.layer.1.gau.o_dense.weight"

    def error(kind, change):
        weights = variables() if form == "tensorflow" else port(variables())
        change(weights)
        with pytest.raises(kind) as caught:
            (model.load_tensorflow_ if form == "tensorflow" else model.load_pytorch_)(weights)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return str(caught.value)

    assert error(ValueError, lambda w: w.pop(name)) == f"supy.GAUAlpha: the checkpoint lacks variables {name}"
    unknown = f"supy.GAUAlpha: the checkpoint has unknown variables {name}/Adam"
    assert error(ValueError, lambda w: w.update({name + "/Adam": w[name]})) == unknown
    shape, turned = ([20, 12], [12, 20]) if form == "tensorflow" else ([12, 20], [20, 12])
    misshapen = f"supy.GAUAlpha: variable {name} has shape {turned}, expected {shape}"
    assert error(ValueError, lambda w: w.update({name: w[name].T})) == misshapen
    numbers = np.zeros((20, 12), np.int64)
    assert f"variable {name} has dtype torch.int64" in error(TypeError, lambda w: w.update({name: numbers}))
    assert f"variable {name} is no array" in error(TypeError, lambda w: w.update({name: np.array(["a"])}))
    assert error(ValueError, dict.clear).endswith("and 11 more")


def test_hostile_folders(tmp_path):
    def error():
        with pytest.raises(ValueError) as caught:
            GAUAlpha.from_pretrained(tmp_path)
        return str(caught.value)

    assert "has no config.json" in error()
    (tmp_path / "config.json").write_text("[" * 100000)
    assert "config.json is not JSON" in error()
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds a list" in error()
    for values, message in (
        ({"hidden_size": 2**60}, "GAUAlphaConfig: hidden_size is 1152921504606846976, expected 1 to 16777216"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 1000"),
        ({"hidden_size": "768"}, "hidden_size is '768', expected int"),
        ({"hidden_dropout_prob": True}, "hidden_dropout_prob is True, expected float"),
        ({"hidden_dropout_prob": math.nan}, "hidden_dropout_prob is nan, expected 0 to 1"),
        ({"attention_key_size": 7}, "attention_key_size is 7, expected an even number"),
        ({}, "has no weights, expected model.safetensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert message in error()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 50)
    assert "not a whole safetensors file" in error()
    save_file(port(variables()), tmp_path / "model.safetensors")  # not of the default size that the config asks for
    assert "lacks variables" in error()
    (tmp_path / "model.safetensors").unlink()

    class Call:
        def __reduce__(self):
            return (tmp_path.joinpath("called").touch, ())

    torch.save({"a": Call()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is no file of tensors" in error()
    assert not (tmp_path / "called").exists()
    torch.save([1], tmp_path / "pytorch_model.bin")
    assert "holds a list, expected names and tensors" in error()


def test_initial_values():
    torch.manual_seed(0)
    config = GAUAlphaConfig(11000, 2, 64, 256, 16, num_hidden_layers=8)  # order 3: half of one layer's
    model = GAUAlpha(config)
    unit = model.units[0]
    for weight, std in (
        (model.tokens.weight, 0.5 / 8),  # more than 10,000 tokens: the second size counts
        (unit.project_in.weight, 0.5 / 8),
        (unit.project_out.weight, 0.5 / 16),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert weight.abs().max() <= 2 * 1.13684723 * std
    assert GAUAlpha(GAUAlphaConfig(900, 2, 64, 64, 16, 1)).tokens.weight.std().item() == pytest.approx(1 / 30, rel=0.03)
    assert torch.equal(unit.scale, torch.ones(2, 16)) and not unit.offset.any()


def test_it_trains_and_compiles():
    torch.manual_seed(0)
    model = GAUAlpha(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hidden = IDS.clone()
    hidden[:, ::4] = 1
    losses = []
    for _ in range(40):
        logits = model(hidden, SEGMENTS)
        loss = torch.nn.functional.cross_entropy(logits[:, ::4].flatten(0, 1), IDS[:, ::4].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS[:, :9]):
        torch.testing.assert_close(compiled(ids), model(ids))
