"""A small Llama that learns English letter by letter: what experiments on trained changes of a decoder have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from narrows.experiments.small_tasks import letters
from narrows.experiments.steady import one_thread

LAYERS, CONTEXT, STEPS, BATCH, RATE = 8, 64, 300, 24, 3e-3


def _codes() -> tuple[Tensor, int]:
    return letters(1_000_000)


def network() -> Any:
    """The Llama with the random weights of seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_codes()[1], hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def held_out(count: int, length: int = CONTEXT) -> Tensor:
    """Passages [count, length] spread over the last tenth of the text, which training does not see."""
    passages = _codes()[0][-(len(_codes()[0]) // 10) :].unfold(0, length, 1)
    return passages[:: len(passages) // count][:count]


@one_thread()
@torch.enable_grad()  # type: ignore[untyped-decorator]
def train(model: Any, loss: Callable[[Any, Tensor, int], Tensor]) -> Any:
    """Train a model, in place, on the first nine tenths: `loss` takes it, ids [BATCH, CONTEXT] and the number of the step."""
    text, generator = _codes()[0], torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    torch.manual_seed(0)
    model.train()
    for step in range(STEPS):
        places = torch.randint(len(text) * 9 // 10 - CONTEXT, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model, torch.stack([text[p : p + CONTEXT] for p in places]), step).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def nats_of(model: Any, ids: Tensor) -> float:
    """Mean nats of a letter in passages [N, T], but for the first."""
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
