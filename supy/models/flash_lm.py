"""A language model of FLASH layers: it trains in time linear in the tokens, and generates each at the same cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from supy._checks import Shapes, require
from supy.models._pretrained import Pretrained, check_config
from supy.nn import MixedChunkAttention, ScaleNorm
from supy.ops import MixedChunkState


@dataclass(frozen=True)
class FlashLMConfig:
    """Sizes of :class:`FlashLM`; two layers have about as many parameters as one Transformer layer as wide.

    chunk_size: within it, attention is quadratic. causal: False for a masked language model. token_shift: half of a
    layer's input comes from the token before. hidden_dropout_prob: of the embeddings, of what a layer adds, and before
    the head.
    """

    vocab_size: int
    hidden_size: int = 512
    intermediate_size: int = 1024
    attention_key_size: int = 128
    num_hidden_layers: int = 12
    chunk_size: int = 256
    causal: bool = True
    token_shift: bool = True
    hidden_dropout_prob: float = 0.0

    def __post_init__(self):
        check_config(self, num_hidden_layers=(1, 1000), hidden_dropout_prob=(0, 1))
        for name in ("attention_key_size", "hidden_size"):
            even = getattr(self, name) % 2 == 0
            require(even, "FlashLMConfig", f"{name} is {getattr(self, name)}, expected an even number")


class FlashState(NamedTuple):
    """What `FlashLM.step` goes on from; it is changed in place, and does not grow."""

    layers: list[MixedChunkState]
    previous: list[torch.Tensor]  # half of each layer's input at the last token, `[B, hidden_size / 2]`


class FlashLM(Pretrained):
    """A causal or masked language model over characters or any other tokens (arXiv 2202.10447; post 8934).

        x = dropout(embedding)
        x = x + dropout(layer(shift(norm(x))))      layer: supy.nn.MixedChunkAttention, norm: supy.nn.ScaleNorm
        logits = dropout(norm(x)) E^T               E: the embeddings

    shift takes the first half of the channels from the token before, and so lets a layer see pairs of tokens;
    FLASH-pytorch has it as an option.

    >>> model = FlashLM(FlashLMConfig(100, 16, 32, 8, num_hidden_layers=2, chunk_size=4)).eval()
    >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
    torch.Size([2, 7, 100])
    >>> prompt = torch.tensor([[5, 6, 7]])
    >>> [token.shape for token in model.generate(prompt, count=3, generator=0)]
    [torch.Size([1]), torch.Size([1]), torch.Size([1])]
    """

    Config: ClassVar[type] = FlashLMConfig
    model_type: ClassVar[str] = "supy_flash"

    def __init__(self, config: FlashLMConfig):
        super().__init__(config)
        layers = config.num_hidden_layers
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norms = nn.ModuleList(ScaleNorm(config.hidden_size) for _ in range(layers + 1))
        self.layers = nn.ModuleList(
            MixedChunkAttention(
                config.hidden_size,
                value_size=config.intermediate_size,
                key_size=config.attention_key_size,
                chunk_size=config.chunk_size,
                causal=config.causal,
            )
            for _ in range(layers)
        )
        nn.init.normal_(self.tokens.weight, std=config.hidden_size**-0.5)

    def forward(self, ids: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of every token before softmax, `[B, T, vocab_size]`: of the next one if causal, else of the one there.

        ids int64 `[B, T]`, lengths int `[B]` or None.
        """
        x = self._dropout(self.tokens(ids))
        for norm, layer in zip(self.norms, self.layers):
            x = x + self._dropout(layer(self._shift(norm(x)), lengths=lengths))
        return self._scores(self._dropout(self.norms[-1](x)))

    @torch.no_grad()
    def prefill(
        self, ids: torch.Tensor, *, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, FlashState]:
        """Reads prompts: the scores of the token after each, `[B, vocab_size]`, and what `step` goes on from."""
        x, state = self.tokens(ids), FlashState([], [])
        sample = torch.arange(len(ids), device=ids.device)
        last = torch.full_like(sample, ids.shape[1] - 1) if lengths is None else lengths.long() - 1
        for norm, layer in zip(self.norms, self.layers):
            y = norm(x)
            branch, memory = layer.prefill(self._shift(y), lengths=lengths)
            state.layers.append(memory)
            state.previous.append(y[sample, last, : y.shape[-1] // 2])
            x = x + branch
        return self._scores(self.norms[-1](x[sample, last])), state

    @torch.no_grad()
    def step(self, ids: torch.Tensor, state: FlashState) -> torch.Tensor:
        """One token more of each sequence, int64 `[B]`: the scores of the next, `[B, vocab_size]`; changes ``state``.
        """
        x = self.tokens(ids)
        for i, (norm, layer, memory) in enumerate(zip(self.norms, self.layers, state.layers)):
            y = norm(x)
            half = y.shape[-1] // 2
            shifted = torch.cat((state.previous[i], y[:, half:]), -1) if self.config.token_shift else y
            state.previous[i] = y[:, :half]
            x = x + layer.step(shifted, memory)
        return self._scores(self.norms[-1](x))

    def generate(
        self,
        prompt: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        count: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        generator: torch.Generator | int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Goes on from prompts, token by token, each of which costs the same; without dropout.

        Args:
            prompt: int64 `[B, T]`, T at least 1.
            lengths: int `[B]`, 1 to T, of the prompts; default T.
            count: of tokens to generate; None for no end but ``stop``.
            temperature: what scores are divided by; 0 always takes the likeliest token.
            top_k: only the k likeliest tokens; of equal scores all.
            top_p: only the likeliest tokens that have this probability together, and at least one.
            stop: ends when every sequence has had this token; those that had it repeat it.
            generator: of random numbers, or the seed of a new one.

        Yields:
            int64 `[B]`: the next token of each sequence.

        Raises:
            ValueError: the model is not causal, or an argument is not as above. Raised by the call itself.
            TypeError: ``prompt`` or ``lengths`` is not a tensor of integers.
        """
        op = "FlashLM.generate"
        require(self.config.causal, op, "the model's config has causal False, expected True")
        shapes = Shapes(op)
        shapes.match("prompt", prompt, "B T", torch.int64)
        vocabulary = self.config.vocab_size
        require(shapes["T"] > 0, op, f"prompt has shape {list(prompt.shape)}, expected [B, T] with T of 1 or more")
        inside = not prompt.numel() or (0 <= prompt.min() and prompt.max() < vocabulary)
        require(bool(inside), op, f"prompt has tokens outside 0 to {vocabulary - 1}")
        if lengths is not None:
            shapes.match("lengths", lengths, "B")
            require(bool((lengths > 0).all()), op, "lengths has an empty prompt, expected 1 or more tokens")
        require(count is None or count >= 0, op, f"count is {count}, expected 0 or more")
        require(0 <= temperature < float("inf"), op, f"temperature is {temperature}, expected 0 or more")
        require(top_k is None or top_k >= 1, op, f"top_k is {top_k}, expected 1 or more")
        require(top_p is None or 0 < top_p <= 1, op, f"top_p is {top_p}, expected more than 0, up to 1")
        if isinstance(generator, int):
            generator = torch.Generator(prompt.device).manual_seed(generator)
        return self._generate(prompt, lengths, count, temperature, top_k, top_p, stop, generator)

    @torch.no_grad()
    def _generate(self, prompt, lengths, count, temperature, top_k, top_p, stop, generator):
        done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        scores, state = None, None
        while count is None or count > 0:
            if state is None:
                scores, state = self.prefill(prompt, lengths=lengths)
            else:
                scores = self.step(token, state)
            token = _choose(scores, temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if stop is not None and done.all():
                return
            count = None if count is None else count - 1

    def _shift(self, x):
        if not self.config.token_shift:
            return x
        half = x.shape[-1] // 2
        return torch.cat((F.pad(x[..., :half], (0, 0, 1, 0))[:, : x.shape[1]], x[..., half:]), -1)

    def _scores(self, x):
        return F.linear(x, self.tokens.weight)

    def _dropout(self, x):
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)


def _choose(
    scores: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """A token of each row of scores `[B, vocab_size]`."""
    scores = scores.float()
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # those before it do
        enough[:, 0] = False
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(enough, 0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
