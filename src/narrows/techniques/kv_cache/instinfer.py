"""Keep keys and values in drives that attend themselves: they are read at the rate of the flash inside, and never cross the link.

Long contexts in large batches have more keys and values than the device's memory holds. On a disk they come through link and
host for every token, and a system that reads them as files gets a fifth of what the drive gives. A drive with an engine
beside its flash channels takes queries and gives back what attention says: a few kilobytes a layer. Sparse, it first reads a
few channels of all keys, finds the eighth of the tokens that count by them, and reads those; it reads whole pages of 16
tokens, so that more than half of the cache is read all the same.

## When it helps
Batch jobs of long sequences on one device, whose answers may take minutes, for the price of drives.

## When it does not
Keys and values that fit: the device's memory is sixty times as fast as a drive's flash. Against the same drive, read at its own
rate, attention inside gains 1.6x: most of the published factor is the file system's path. First tokens and each further
one: a step takes seconds.

## Reference
Pan et al., InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference, 2024, arXiv 2409.04992
(InstAttention at HPCA 2025). A drive has eight channels of 1.4 GB/s and a link of 7 GB/s (section 5). The file path's rate is
not given: 88.1 % less time for keys and values than FlexGen's (figure 14) makes it 1.33 GB/s. That the engine's arithmetic
may take longer than its flash, writing while prompts are read, and weights on the host are not in the model.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.cost import Limit
from narrows.errors import NarrowsError
from narrows.simulate.demand import Demand, Deployment
from narrows.simulate.step_times import Shelf
from narrows.technique import Card, Claim, No, Serves, Verdict, choice

FLASH_BYTES_PER_S, LINK_BYTES_PER_S, ROOM_BYTES = 8 * 1.4e9, 7e9, 2e12  # of a drive
PAGE = 16  # tokens of a page of keys and values


@dataclass(frozen=True)
class InstInfer(Serves):
    """Decoding's attention runs inside the drives; the rest stays on the device."""

    card: ClassVar[Card] = Card(
        "instinfer",
        relieves=(Limit.CAPACITY, Limit.STORAGE),
        phases=("decode",),
        exact=False,
        price="sparse: what few channels of the keys miss; drives with an engine; steps of seconds",
        claims=(
            Claim("dense", "x", 6.85, "simulated, OPT-13B on an A6000, 64 prompts and answers of 1,024 tokens in one batch: "
                  "tokens per second over the path through files, whose rate is of the paper's figure 14", "section 6.2, "
                  "figure 12", "simulated", "30 % of the paper's figure either way: its step has half a second that is "
                  "not cache, ours 0.04", at_least=4.8, at_most=8.9),
            Claim("sparse", "x", 11.1, "the same, sparse, 256 at a time, over the path through files, 64 at a time",
                  "abstract; figure 12", "simulated", "30 % of the paper's figure either way", at_least=7.8, at_most=14.4),
            Claim("pages", "x", 2.08, "run, SmolLM2-135M at 1,024 tokens of real text: what reading only the pages of 16 tokens "
                  "with one of the eighth that counts most, and an eighth of the keys' channels, leaves out; not a number "
                  "outside of the drive", "section 6.2: over dense, 256 at a time", "run",
                  "30 % of the paper's figure either way", at_least=1.46, at_most=2.7),
            Claim("over_the_link", "x", None, "as dense, over the same drive read at the rate of its link", "section 2: "
                  "bandwidth inside over that outside", "simulated",
                  "11.2 over 7 GB/s, a tenth either way", at_least=1.44, at_most=1.76),
        ),
    )  # fmt: skip
    inside: bool = choice(True, False, help="attention in the drives; without, keys and values are read as files")
    sparse: bool = choice(False, True, help="an eighth of the tokens counts, found by an eighth of the keys' channels")
    drives: int = choice(1, 2, help="that share the heads")
    file_gb_per_s: float = choice(1.33, 7.0, help="GB a second of the path through files (7: the drive's link itself)")
    pages: float = choice(0.6, help="share of pages of 16 tokens that hold one that counts (measured on SmolLM2 at 1,024 tokens)")

    def __post_init__(self) -> None:
        if not (self.drives >= 1 and self.file_gb_per_s > 0 and 0 < self.pages <= 1):
            raise NarrowsError(f"{self} cannot be.", where=self.card.slug, remedy="Give a drive, a rate, and a share of pages.")

    def baseline(self) -> "InstInfer":
        return InstInfer(inside=False)

    @property
    def read(self) -> float:
        """Share of keys and values that a token reads: an eighth of the channels of all keys, and the pages that count."""
        return 1 / 8 / 2 + self.pages if self.sparse else 1.0

    def check(self, demand: Demand) -> Verdict:
        """Refuses a load whose keys and values fit the device's memory: that is faster."""
        group = demand.group
        longest = max(r.prompt + r.output for r in demand.requests)
        running = min(group.rules.max_sequences, -(-len(demand.requests) // group.replicas))
        try:
            fits = group.room() * group.rules.block >= running * longest
        except NarrowsError:
            fits = False
        return No(f"{running} sequences of {longest} tokens fit the memory of {group.machine.name}") if fits else True

    def deploy(self, demand: Demand) -> Deployment:
        """The same replicas with keys and values in drives."""
        room = ROOM_BYTES * self.drives / (1.5 if self.sparse else 1)  # keys are kept twice, by tokens and by channels
        if self.inside:
            shelf = Shelf(room, FLASH_BYTES_PER_S * self.drives, self.read, LINK_BYTES_PER_S * self.drives)
        else:
            shelf = Shelf(room, self.file_gb_per_s * 1e9, self.read)
        return Deployment(replace(demand.group, shelf=shelf))
