"""Trains a FLASH language model on Song dynasty lyrics, a Transformer of the same size beside it, and writes poems.

    python examples/flash_language_model.py [--epochs N] [--no-shift] [--seed N] [--out DIR]

With the 19,050 poems of text/songci at hand (SUPY_DATA; see README.md) it learns from those, else from poems that it
generates. Both networks see the same characters in the same order. A run that was killed goes on where it last saved.

Much of the difference is FLASH's token shift, which this Transformer does not have; --no-shift trains FLASH without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from supy.events import TrainingOptions, data_folder
from supy.models import FlashLM, FlashLMConfig

SONGCI = "https://github.com/chinese-poetry/chinese-poetry"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = TrainingOptions().use_bf16(DEVICE)  # where the processor multiplies such numbers
LENGTH, BATCH = 256, 4  # characters in a row of packed poems, and rows in a step
SAVE_EVERY = 20  # seconds
RATES = {"FLASH": 3e-3, "Transformer": 2.2e-3}  # the best of those tried; see benchmarks/NOTES.md


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=1, help="passes over the training poems (default: 1)")
    parser.add_argument("--generate", type=int, metavar="N", help="learn from so many generated poems")
    parser.add_argument("--width", type=int, default=192, help="of both networks (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of FLASH; half as many of the Transformer (default: 6)")
    parser.add_argument("--no-shift", action="store_true", help="no layer of FLASH sees the character before directly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/songci"), help="folder of the model (%(default)s)")
    args = parser.parse_args()

    try:
        train, dev = load(args.generate)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}; get {SONGCI}, or set SUPY_DATA= to generate poems\n")
    alphabet = Alphabet(train)
    print(f"{len(train)} poems of {sum(map(len, train))} characters to learn from, {len(dev)} for development; "
          f"{len(alphabet)} different characters\n")  # fmt: skip

    torch.manual_seed(args.seed)
    config = FlashLMConfig(
        len(alphabet),
        args.width,
        intermediate_size=2 * args.width,
        attention_key_size=64,
        num_hidden_layers=args.layers,
        chunk_size=128,
        token_shift=not args.no_shift,
    )
    flash = FlashLM(config)
    networks = {"FLASH": flash, "Transformer": Transformer(config, size(flash))}
    rows = []
    for name, network in networks.items():
        checkpoint = args.out / f"{name.lower()}-checkpoint.safetensors"
        settings = {"seed": args.seed, "epochs": args.epochs, "sizes": str(config), "poems": len(train)}
        try:
            seconds = fit(network.to(DEVICE), train, alphabet, args.epochs, args.seed, name, checkpoint, settings)
        except ValueError as error:
            parser.exit(2, f"{error}\n")
        rows.append(f"{name:12}{size(network):12,}{perplexity(network, dev, alphabet):12.2f}{seconds:11.0f} s")
    flash.save_pretrained(args.out)
    (args.out / "characters.json").write_text(json.dumps(alphabet.characters, ensure_ascii=False), encoding="utf-8")
    for name in networks:  # no longer needed
        (args.out / f"{name.lower()}-checkpoint.safetensors").unlink()

    print(f"\n{'':12}{'parameters':>12}{'perplexity':>12}{'training':>13}")
    print(*rows, sep="\n")
    print(f"\nPerplexity is of a character of the {len(dev)} other poems. The model is in {args.out}; it writes:")
    titles = Counter(poem.partition("·")[0] for poem in train)
    for i, (title, _) in enumerate(titles.most_common(4)):
        write(flash, alphabet, f"{title}·", args.seed + i)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def load(generated: int | None = None) -> tuple[list[str], list[str]]:
    """Poems to learn from and 500 others, each its title, a dot and the author, and its lines."""
    folder = None if generated else data_folder()
    if folder is None:
        print(f"Generated poems; for real ones get {SONGCI}, and see README.md.")
        poems = generate((generated or 4000) + 200)
        return poems[200:], poems[:200]
    path = folder / "text" / "songci" / "songci.txt"
    poems = [poem.strip() for poem in path.read_text(encoding="utf-8").split("\n\n")]
    lines = {poem.partition("\n")[2]: poem for poem in poems}  # some stand there twice, by different titles
    poems = [poem for text, poem in lines.items() if text]
    if len(poems) < 1000:
        raise ValueError(f"{path}: expected poems with a blank line between them, got {len(poems)}")
    Random(0).shuffle(poems)
    return poems[500:], poems[:500]


# What the generated poems are made of: a title has its own lengths of lines, and lines that rhyme end alike.
TITLES = {"浣溪沙": (7, 7, 7, 7, 7, 7), "忆江南": (3, 5, 7, 7, 5), "卜算子": (5, 5, 7, 5, 5, 5, 7, 5), "生查子": (5,) * 8}
NOUNS = "春风 秋月 江水 青山 落花 夜雨 孤舟 远树 斜阳 归雁 芳草 小楼 明烛 白云 寒灯 疏钟".split()
VERBS = "照 入 满 伴 隔 送 迎 过".split()
SEASONS = "去年 今夜 何时 此日 天涯 故国 平生 人间".split()
RHYMES = ["东风同空红中", "天年边烟前泉", "秋楼舟愁流游", "归飞衣微晖稀"]


def generate(count: int, seed: int = 0) -> list[str]:
    """Poems of TITLES, whose second halves take up words of the first. A seed always gives the same."""
    random, poems = Random(seed), []

    def pick(some: Sequence[str]) -> str:
        return some[int(random.random() * len(some))]  # random() alone is promised to stay the same

    for _ in range(count):
        title, rhyme, subject = pick(list(TITLES)), pick(RHYMES), pick(NOUNS)
        lines = []
        for length in TITLES[title]:
            line = {3: "", 5: pick(NOUNS), 7: pick(SEASONS) + (subject if len(lines) > 2 else pick(NOUNS))}[length]
            lines.append(line + pick(VERBS) + pick(NOUNS)[0] + pick(rhyme) + "。")
        poems.append("\n".join([f"{title}·无名", *lines]))
    return poems


class Alphabet:
    """Numbers of characters: 0 for those that come only once, 1 for what stands before each poem, and so ends one."""

    BEGIN = 1

    def __init__(self, poems: Sequence[str]):
        counts = Counter(character for poem in poems for character in poem)
        self.characters = ["□", "", *sorted(c for c, n in counts.items() if n > 1)]
        self.numbers = {character: number for number, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        return [self.numbers.get(character, 0) for character in text]

    def pack(self, poems: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """All poems, one after another, cut into rows `[N, LENGTH]`; and the characters that come next."""
        stream = torch.tensor([i for poem in poems for i in (self.BEGIN, *self.encode(poem))] + [self.BEGIN])
        rows = (len(stream) - 1) // LENGTH
        if rows == 0:
            raise ValueError(f"{len(stream)} characters are less than a row of {LENGTH}")
        return stream[: rows * LENGTH].view(rows, LENGTH), stream[1 : rows * LENGTH + 1].view(rows, LENGTH)


class Transformer(nn.Module):
    """What FLASH is compared with: as wide, pre-norm, learned positions; inner layers that give it ``parameters``."""

    def __init__(self, config: FlashLMConfig, parameters: int):
        super().__init__()
        width, count = config.hidden_size, max(1, config.num_hidden_layers // 2)
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(LENGTH, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        heads = max(1, width // 64)

        def layers(inner):
            layer = nn.TransformerEncoderLayer(width, heads, inner, 0.0, "gelu", batch_first=True, norm_first=True)
            return nn.TransformerEncoder(layer, count, nn.LayerNorm(width), enable_nested_tensor=False)

        room = parameters - size(self) - size(layers(1))
        self.layers = layers(1 + max(0, round(room / (count * (2 * width + 1)))))
        for layer in self.layers.layers:  # the sum of all branches begins small
            for output in (layer.self_attn.out_proj, layer.linear2):
                nn.init.normal_(output.weight, std=0.02 / math.sqrt(2 * count))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight
        return F.linear(self.layers(x, mask=self.mask, is_causal=True), self.tokens.weight)


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def fit(
    network: nn.Module,
    train: Sequence[str],
    alphabet: Alphabet,
    epochs: int,
    seed: int,
    name: str,
    checkpoint: Path,
    settings: dict,
) -> float:
    """AdamW; its learning rate rises for a twentieth of the steps, then falls to 0 in a cosine. Returns the seconds."""
    rate = RATES[name]
    matrices = [p for p in network.parameters() if p.ndim == 2 and min(p.shape) > 4]
    chosen = set(map(id, matrices))
    others = [p for p in network.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    each = len(alphabet.pack(train)[0]) // BATCH
    steps = epochs * each
    first, before = restore(checkpoint, settings, network, optimizer)
    start = saved = time.monotonic()
    with tqdm(total=steps, initial=first, desc=f"training, {name}", unit="step") as bar:
        for step in range(first, steps):
            if step == first or step % each == 0:
                random = Random(f"{seed}-{step // each}")
                ids, targets = (rows.to(DEVICE) for rows in alphabet.pack(random.sample(train, len(train))))
                order = torch.tensor(random.sample(range(len(ids)), len(ids)))
            rows = order[step % each * BATCH :][:BATCH]
            done = (step + 1) / steps
            for group in optimizer.param_groups:
                group["lr"] = rate * min(20 * done, 0.5 + 0.5 * math.cos(math.pi * done))
            loss = cross_entropy(network, ids[rows], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            bar.update()
            bar.set_postfix(perplexity=f"{math.exp(loss.item()):.1f}", refresh=False)
            if step + 1 == steps or time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                save(checkpoint, settings, network, optimizer, step + 1, before + saved - start)
    return before + time.monotonic() - start


def cross_entropy(network: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
        scores = network(ids)
    return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(network: nn.Module, poems: Sequence[str], alphabet: Alphabet) -> float:
    """Of one character, line breaks and ends of poems among them."""
    network.eval()
    ids, targets = (rows.to(DEVICE) for rows in alphabet.pack(poems))
    losses = [cross_entropy(network, ids[i : i + 1], targets[i : i + 1]).item() for i in range(len(ids))]
    return math.exp(sum(losses) / len(losses))


def save(path: Path, settings: dict, network: nn.Module, optimizer: torch.optim.Optimizer, *done) -> None:
    """Writes another file and renames it, so that a kill at any moment leaves a whole one."""
    tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, temporary, {"settings": json.dumps(settings), "done": json.dumps(done)})
    os.replace(temporary, path)


def restore(path: Path, settings: dict, network: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """The steps and the seconds that the run has behind it: 0 without a checkpoint."""
    if not path.exists():
        return [0, 0.0]
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to start anew") from None
    if metadata.get("settings") != json.dumps(settings):
        raise ValueError(f"{path} is of another run, {metadata.get('settings')}; give another --out, or remove it")
    network.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("network/")})
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/")
            states.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return json.loads(metadata["done"])


def write(flash: FlashLM, alphabet: Alphabet, title: str, seed: int) -> None:
    """Prints a poem of this title, character by character, as it comes."""
    prompt = torch.tensor([[alphabet.BEGIN, *alphabet.encode(title)]], device=DEVICE)
    print(f"\n{title}", end="")
    for token in flash.generate(prompt, count=300, temperature=0.9, top_p=0.9, stop=alphabet.BEGIN, generator=seed):
        print(alphabet.characters[token.item()], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
