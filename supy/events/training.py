"""The training loop: ordinary PyTorch, meant to be read and copied.

Every random choice follows from (seed, epoch, step), so a run that was killed goes on from its last epoch and ends with
the same weights as one that was not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from supy._checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from supy._device import multiplies_bf16
from supy.events.augment import swap_arguments
from supy.events.batches import Tokenizer, bucketed, collate, make_windows
from supy.events.data import Document
from supy.events.labels import encode
from supy.events.metrics import Scores
from supy.events.model import EventModel
from supy.optim import warm_average

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """How :func:`train` trains.

    batch_size: windows a step. learning_rate: its peak, after ``warmup`` (a fraction of all steps), before a cosine to 0.
    clip: largest norm of the gradient. average: decay of the moving average of the weights, which is what is evaluated
    and kept. swap: probability that an argument's words are replaced by those of another argument of its kind.
    patience: evaluations without progress before training stops. bf16: autocast to bfloat16; None: where the processor
    multiplies in it. seed: of everything random.
    """

    epochs: int = 26
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    average: float = 0.998
    swap: float = 0.7
    evaluate_every: int = 4
    patience: int = 5
    bf16: bool | None = None
    seed: int = 0

    def use_bf16(self, device: torch.device) -> bool:
        return multiplies_bf16(device) if self.bf16 is None else self.bf16


def train(
    model: EventModel,
    documents: Sequence[Document],
    evaluate: Callable[[EventModel], Scores],
    tokenizer: Tokenizer,
    options: TrainingOptions,
    *,
    size: int,
    overlap: int,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> EventModel:
    """Trains ``model`` and returns its moving average at the best score of ``evaluate`` (event F1 + argument F1).

    size, overlap: of the windows over long documents, in tokens. With a ``checkpoint``, the run's state is saved after
    each epoch, and a run that was killed goes on from there.
    """
    device = next(model.parameters()).device
    bf16 = options.use_bf16(device)
    average = AveragedModel(model, multi_avg_fn=warm_average(options.average)).eval()
    optimizer = torch.optim.AdamW(
        _groups(model, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.98), fused=True
    )
    best = _copy(average)
    first, best_score, since_best = 0, -1.0, 0
    if checkpoint and (saved := checkpoint.load()):
        tensors, state = saved
        model.load_state_dict(tensors["model"])
        average.load_state_dict(tensors["average"])
        load_optimizer(optimizer, tensors["optimizer"])
        best, first = tensors["best"], state["epoch"]
        best_score, since_best = state["best_score"], state["since_best"]
        log.info("going on after epoch %d of %s", first, checkpoint.path)

    for epoch in range(first + 1, options.epochs + 1):
        if since_best >= options.patience:
            break
        random = Random(f"{options.seed}-{epoch}")
        swapped = swap_arguments(documents, options.swap, random)
        windows = make_windows(swapped, tokenizer, size=size, overlap=overlap).windows
        batches = bucketed(windows, options.batch_size, random)
        bar = tqdm(batches, desc=f"epoch {epoch}/{options.epochs}", disable=not progress)
        total = 0.0
        model.train()
        for step, batch in enumerate(bar):
            torch.manual_seed(random.getrandbits(60))
            done = (epoch - 1 + step / len(batches)) / options.epochs
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(done, options.warmup)

            ids, lengths = collate(batch, tokenizer.PADDING, device)
            labels = encode(
                [window.document for window in batch],
                model.schema,
                [window.tokens.offsets for window in batch],
                typed=model.typed,
            )
            hidden_ids = model.encoder.hide(ids)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden = model(hidden_ids, lengths)
            loss = model.loss(hidden, lengths, labels)
            loss = loss + model.encoder.restoring_loss(hidden, ids, lengths, hidden_ids)

            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            average.update_parameters(model)

            total += loss.item()
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"supy.events: the loss is {loss.item()} in epoch {epoch}, step {step + 1}; "
                    f"try a learning rate below {options.learning_rate}"
                )
            bar.set_postfix(loss=f"{total / (step + 1):.2f}")

        if epoch % options.evaluate_every == 0 or epoch == options.epochs:
            scores = evaluate(average.module)
            score = scores.event.f1 + scores.argument.f1
            since_best += 1
            if score > best_score:
                best, best_score, since_best = _copy(average), score, 0
            if progress:
                tqdm.write(
                    f"dev: argument F1 {scores.argument.f1:.4f}, event F1 {scores.event.f1:.4f}"
                )
        if checkpoint:
            tensors = {"model": model.state_dict(), "average": average.state_dict(), "best": best}
            tensors["optimizer"] = optimizer_tensors(optimizer)
            state = {"epoch": epoch, "best_score": best_score, "since_best": since_best}
            checkpoint.save(tensors, state)

    average.module.load_state_dict(best)
    return average.module


def _schedule(done: float, warmup: float) -> float:
    """Factor of the learning rate after the fraction ``done`` of all steps: up in a line, down in a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of linear layers and embeddings, none for scales, offsets and biases."""
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    chosen = set(map(id, decayed))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _copy(average: AveragedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in average.module.state_dict().items()}
