"""How a serving engine decides what a step holds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """How an engine schedules; presets lie in data/engines.toml.

    max_sequences, max_tokens   sequences that run at a time; rows of a step
    mixed       prompts and decoding share steps; otherwise steps of prompts go first and decoding waits
    chunked     a prompt may be read in pieces
    block       tokens of a block of keys and values
    reserve     share of the output still to come for which room must be free when a request is let in
    watermark   share of the blocks that stays free when a request is let in
    prefix_cache   keys and values of prompts are kept for others while there is room
    swap        who loses its room while it decodes waits with its keys and values in the first tier below, where prompts give
                way to them; both ways delay the step in which it comes back (False, or no room there: they are made again)
    batched     nobody is let in before all who run have their answer (no continuous batching)
    patience    tokens that a prompt may be longer for every second it has waited and still be read first (0: in the order
                of arrival)
    layered     prompts are read whole, by so many groups of layers, one a step, that a step reads about this many
                tokens' worth of them (0: by tokens, through all layers)
    """

    name: str = "vllm-v1"
    max_sequences: int = 256
    max_tokens: int = 8192
    mixed: bool = True
    chunked: bool = True
    block: int = 16
    reserve: float = 0.0
    watermark: float = 0.0
    prefix_cache: bool = True
    batched: bool = False
    layered: int = 0
    patience: float = 0.0
    swap: bool = False
