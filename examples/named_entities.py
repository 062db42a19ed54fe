"""Trains a named-entity recogniser twice, with rotary positions in its pointer and without, and compares the two.

    python examples/named_entities.py [--epochs N] [--seed N]

With UNER's Chinese GSDSIMP at hand (SUPY_DATA; see README.md) it uses ner/uner_zh in it, else sentences that it
generates, whose entities are nested. A score judges a start and an end together, so nesting costs nothing; but without
rotary positions (kexue.fm post 8373) the two do not know how far apart they are, and pair up across entities.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from supy.events import data_folder
from supy.nn import EfficientGlobalPointer

UNER = "https://github.com/UniversalNER/UNER_Chinese-GSDSIMP"


class Sentence(NamedTuple):
    text: str
    entities: frozenset[tuple[str, int, int]]  # type, first and last character


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", type=positive, metavar="N", help="train on so many generated sentences")
    args = parser.parse_args()

    try:
        train, dev, test = load(args.generate)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}; get {UNER}, or set SUPY_DATA= to generate sentences\n")
    print(f"{len(train)} sentences to train on, {len(dev)} for development, {len(test)} for the test\n")
    taggers = {}
    for rotary in (True, False):
        torch.manual_seed(args.seed)
        name = "rotary positions" if rotary else "no positions"
        taggers[name] = Tagger(train, rotary=rotary)
        fit(taggers[name], train, epochs=args.epochs, seed=args.seed, name=name)

    print(f"\n{'entity F1':18}{'dev':>8}{'test':>8}")
    for name, tagger in taggers.items():
        print(f"{name:18}{f1(tagger, dev):8.1%}{f1(tagger, test):8.1%}")
    several = [s for s in test if 3 <= len(s.entities) <= 6 and len(s.text) <= 60][:4]
    for sentence in several:
        print("\nannotated         ", mark(sentence))
        for name, tagger in taggers.items():
            print(f"{name:18}", mark(tagger.predict([sentence])[0]))


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def load(generated: int | None = None) -> list[list[Sentence]]:
    """Sentences to train on, for development and for the test."""
    folder = None if generated else data_folder()
    if folder is not None:
        return [read_iob2(folder / "ner" / "uner_zh" / f"{part}.iob2") for part in ("train", "dev", "test")]
    print(f"Generated sentences; for real ones get {UNER}, and see README.md.")
    sentences = generate((generated or 1500) + 600)
    return [sentences[600:], sentences[:300], sentences[300:600]]


def read_iob2(path: Path) -> list[Sentence]:
    """Lines of number, word, tag and more between tabs, and a blank line after a sentence. The words are joined."""
    sentences, text, entities = [], "", []
    for place, line in enumerate([*path.read_text(encoding="utf-8").split("\n"), ""], 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            if text:
                sentences.append(Sentence(text, frozenset(entities)))
            text, entities = "", []
            continue
        _, word, tag = [*line.split("\t"), "", ""][:3]
        end = len(text) + len(word) - 1
        if tag[:2] == "B-":
            entities.append((tag[2:], len(text), end))
        elif tag[:2] == "I-" and entities and entities[-1][2] == len(text) - 1:
            entities[-1] = (*entities[-1][:2], end)
        elif tag != "O":
            raise ValueError(f"{path}:{place}: expected number, word, and O, B-TYPE or I-TYPE, got {line[:60]!r}")
        text += word
    return sentences


# What can stand for what; {NAMES} in capitals are entities. Nobody is meant by the people.
GRAMMAR = {
    "sentence": [
        "{people}{day}离开{LOC}，前往{LOC}。",
        "{PER}生于{LOC}，曾在{houses}任职。",
        "{houses}{day}签署协议。",
        "{day}，{people}从{LOC}来到{ORG}，见到了{PER}。",
        "{places}{day}有雨，{ORG}提醒市民注意安全。",
        "{day}的会议上没有人发言。",
    ],
    "people": ["{PER}和{PER}", "{PER}、{people}", "{PER}、{people}"],
    "places": ["{LOC}和{LOC}", "{LOC}、{places}", "{LOC}、{places}"],
    "houses": ["{ORG}和{ORG}", "{ORG}、{houses}"],
    "PER": ["{surname}{given}", "{surname}{given}{given}"],
    "LOC": ["{town}", "{town}", "{town}{syllable}", "{LOC}{syllable}{area}"],
    "town": ["{syllable}{syllable}"],
    "ORG": ["{LOC}{house}", "{LOC}{house}", "{LOC}{PER}{house}", "{ORG}{part}"],
    "surname": list("王李张刘陈杨赵黄周吴徐孙胡朱高何郭马罗梁宋郑谢韩唐冯于董萧"),
    "given": list("伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞刚桂英华玉兰建国志文"),
    "syllable": list("南北东西江海山河湖川阳安宁平州城原林门口桥泉新长广大金石白青云龙"),
    "area": list("县区镇乡村"),
    "house": "大学 医院 银行 中学 博物馆 图书馆 纪念馆 公司".split(),
    "part": "法学院 研究所 分部 编辑部 董事会".split(),
    "day": "昨天 今年 去年秋天 五月三日 星期一 上午 最近".split(),
}


def generate(count: int, seed: int = 0) -> list[Sentence]:
    """Sentences of GRAMMAR with nested entities, each once: `[ORG [LOC 北安] 大学]`. A seed always gives the same."""
    random, found = Random(seed), {}

    def expand(name: str, text: str, entities: list) -> str:
        start = len(text)
        rule = GRAMMAR[name][int(random.random() * len(GRAMMAR[name]))]  # random() alone is promised to stay the same
        for plain, inner in re.findall(r"([^{]*)(?:{(\w+)})?", rule):
            text = expand(inner, text + plain, entities) if inner else text + plain
        if name.isupper():
            entities.append((name, start, len(text) - 1))
        return text

    while len(found) < count:
        text = expand("sentence", "", entities := [])
        found.setdefault(text, Sentence(text, frozenset(entities)))
    return list(found.values())


class Tagger(nn.Module):
    """Embeddings of characters and of pairs of them, convolutions, and the pointer; the characters are the tokens.

    A convolution sees the neighbours of a token, not where in the sentence it is. What is rare or unknown has number 1,
    padding 0.
    """

    def __init__(self, train: Sequence[Sentence], *, rotary: bool, width: int = 128, layers: int = 2):
        super().__init__()
        self.types = sorted({type for sentence in train for type, _, _ in sentence.entities})
        self.known = [vocabulary(grams(s.text, n) for s in train) for n in (1, 2)]
        self.embeddings = nn.ModuleList(nn.Embedding(len(known) + 2, width) for known in self.known)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(layers))
        self.dropout = nn.Dropout(0.2)
        self.pointer = EfficientGlobalPointer(width, len(self.types), rotary=rotary)
        nn.init.constant_(self.pointer.biases.bias, -1.0)  # begins with few entities, as there are

    def forward(self, sentences: Sequence[Sentence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[B, T, width]` and lengths `[B]`."""
        lengths = torch.tensor([len(s.text) for s in sentences])
        visible = torch.arange(lengths.max()) < lengths[:, None]
        x = 0
        for n, (known, embedding) in enumerate(zip(self.known, self.embeddings), 1):
            rows = [torch.tensor([known.get(g, 1) for g in grams(s.text, n)]) for s in sentences]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            if self.training:  # so that unknown ones are learned
                ids = ids.masked_fill(torch.rand(ids.shape) < (0.05, 0.3)[n - 1], 1)
            x = x + embedding(ids)
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = x + self.dropout(F.gelu(layer((x * visible[..., None]).mT).mT))
        return self.dropout(x), lengths

    def loss(self, sentences: Sequence[Sentence]) -> torch.Tensor:
        hidden, lengths = self(sentences)
        rows = [
            (b, self.types.index(type), first, last)
            for b, sentence in enumerate(sentences)
            for type, first, last in sentence.entities
        ]
        return self.pointer.loss(hidden, torch.tensor(rows, dtype=torch.int64).view(-1, 4), lengths=lengths)

    @torch.no_grad()
    def predict(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """The same texts with the entities that are found in them."""
        found: list[set] = [set() for _ in sentences]
        for start in range(0, len(sentences), 32):
            hidden, lengths = self(sentences[start : start + 32])
            for b, kind, first, last in self.pointer.spans(hidden, lengths=lengths)[0].tolist():
                found[start + b].add((self.types[kind], first, last))
        return [Sentence(s.text, frozenset(entities)) for s, entities in zip(sentences, found)]


def grams(text: str, n: int) -> list[str]:
    """What begins at each character, n characters of it."""
    return [text[i : i + n] for i in range(len(text))]


def vocabulary(texts: Iterable[list[str]]) -> dict[str, int]:
    """Numbers from 2 on for what comes twice or more."""
    counts = Counter(gram for text in texts for gram in text)
    return {gram: number for number, gram in enumerate((g for g, n in counts.items() if n > 1), 2)}


def fit(tagger: Tagger, train: Sequence[Sentence], *, epochs: int, seed: int, name: str) -> None:
    """Batches of eight sentences of like length; AdamW, its learning rate rising for a tenth of the steps, then falling."""
    random = Random(seed)
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=3e-3, fused=True)
    steps = epochs * -(-len(train) // 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * step / steps, (1 - step / steps) / 0.9)
    )
    with tqdm(total=steps, desc=f"training, {name}") as bar:
        for _ in range(epochs):
            order = sorted(train, key=lambda sentence: len(sentence.text) + 16 * random.random())
            batches = [order[i : i + 8] for i in range(0, len(order), 8)]
            random.shuffle(batches)
            for batch in batches:
                loss = tagger.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    tagger.eval()


def f1(tagger: Tagger, sentences: Sequence[Sentence]) -> float:
    """Entities whose type, start and end are right, against all that are found and all that are annotated."""
    pairs = [(s.entities, p.entities) for s, p in zip(sentences, tagger.predict(sentences))]
    return 2 * sum(len(a & b) for a, b in pairs) / max(1, sum(len(a) + len(b) for a, b in pairs))


def mark(sentence: Sentence) -> str:
    """ "北安大学" with an ORG that holds a LOC: "[ORG [LOC 北安]大学]"."""
    text = sentence.text
    opening, closing = [""] * len(text), [""] * len(text)
    for type, first, last in sorted(sentence.entities, key=lambda e: (e[1] - e[2], e)):  # long ones outside
        opening[first] += f"[{type} "
        closing[last] += "]"
    return "".join(o + character + c for o, character, c in zip(opening, text, closing))


if __name__ == "__main__":
    main()
