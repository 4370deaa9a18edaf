"""Train a decoder to answer after any of its layers; then let its first layers draft tokens that the others check.

Training leaves layers out, the higher the more often, and asks the shared output head for the next token after some layers in
turn as well. Decoding drafts with the first layers alone; the check starts from the streams they have left, on top of the same
keys and values. The text is that of the whole model, and no weight is added.

`loss` trains with it, `generate` decodes, `measure` predicts the gain on a machine for the share of drafts that is taken.

## When it helps
One or few sequences: a step's time is that of reading the weights, of which a draft reads a part, and a check of several
tokens reads the rest once.

## When it does not
Models that were not trained so: their lower layers speak another language than the head. Full batches, where checking tokens
that are then dropped costs what it takes. Text that a fraction of the depth cannot foresee: below about half of the drafts
taken, each draft costs more than it brings. A large vocabulary makes drafts dear: each reads the whole head.

## Reference
Elhoushi et al.: LayerSkip, arXiv 2404.16710 (2024), and the authors' code. Greedy decoding of one sequence
here; of the curricula, the rotating one for the exits' losses and none for the dropout.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.parallel import is_layer, layer_count
from narrows.simulate.speculation import Speculation
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import torch

    from narrows.modules.speculation import Speculated


@dataclass(frozen=True)
class LayerSkip(Measures):
    """Draft `ahead` tokens with the first `exit` of the layers, and check them with the rest."""

    exit: float = choice(0.25, 0.125, 0.375, 0.5, help="share of the layers that draft")
    ahead: int = choice(2, 3, 4, 6, 8, 12, help="tokens drafted before a check")
    taken: float = choice(0.7, 0.5, 0.6, 0.8, 0.9, help="share of the drafts that the check takes, for `measure`")
    dropout: float = choice(0.1, 0.2, help="training: how often the highest layer is left out")
    scale: float = choice(1.0, 0.2, help="training: weight of the exits' losses beside the last layer's")
    rotation: int = choice(4, 8, help="training: one exit in so many has a loss at a step, in turn")

    card: ClassVar[Card] = Card(
        "layerskip",
        relieves=(Limit.BANDWIDTH,),
        phases=("decode",),
        exact=True,
        price="training with exits, on the whole corpus or on that of the task",
        claims=(
            Claim("agreement", "of the letters", None, "Llama of 8 layers trained on letters: where an exit after 1 to 7 of them "
                  "says what the whole says, held-out text", "abstract: accuracy of early exits", "run",
                  "plain training gives 0.59; NaN where drafted text is not the plain one", at_least=0.7),
            Claim("last_layer", "x", None, "nats of the whole model over those of plain training, where the exits agree",
                  "a check of ours: the whole must not lose", "run", "2 % more at most; infinite where exits do not agree",
                  at_most=1.02),
            Claim("speedup", "x", 2.16, "Llama-2-7B, A100, exit after a quarter, our share of drafts taken; paper: up to",
                  "abstract", "simulated", "a clear gain: a network of letters is foreseen worse; plain training gives 1.2",
                  at_least=1.28, at_most=2.81),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = 0 < self.exit < 1 and 0 <= self.taken < 1 and 0 <= self.dropout < 1 and self.scale >= 0
        if not (shares and min(self.ahead, self.rotation) >= 1):
            remedy = "Give shares from 0 to below 1, and counts from 1 on."
            raise NarrowsError(f"{self} is not possible.", where="layerskip", remedy=remedy)

    def baseline(self) -> "LayerSkip":
        return replace(self, dropout=0.0, scale=0.0)

    def drafting(self, layers: int) -> int:
        """How many of the layers draft."""
        return max(1, round(self.exit * layers))

    def loss(self, model: "torch.nn.Module", ids: "torch.Tensor", step: int) -> "torch.Tensor":
        """The loss of a training step, by its number, on ids [B, T]: call `backward` on it, with any optimizer."""
        from narrows.modules.early_exit import dropping, exit_loss, stack

        exits = [n for n in range(1, len(stack(model, "layerskip").layers)) if n % self.rotation == step % self.rotation]
        with dropping(model, self.dropout):
            return exit_loss(model, ids, exits if self.scale else [], self.scale)

    def generate(self, model: "torch.nn.Module", ids: "torch.Tensor", tokens: int) -> "Speculated":
        """Continue ids [1, T] by `tokens`, the same that the model gives greedily one by one, and say what was taken."""
        from narrows.modules.early_exit import self_speculate, stack

        exit = self.drafting(len(stack(model, "layerskip").layers))
        found: Speculated = self_speculate(model, ids, tokens, exit, self.ahead)
        return found

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """The speed-up of decoding over one token at a time, at the context of the step, and where a round's time goes."""
        context = step.past + (0 if step.phase == "decode" else step.new)
        inside = graph.map(lambda op: op if is_layer(op) else None)
        outside = graph.map(lambda op: None if is_layer(op) else op)
        layers = layer_count(graph)
        part = self.drafting(layers) / layers if layers else 1.0

        def lasts(of: Graph, new: int) -> float:
            size = Step(step.batch, new, context, step.source, "decode")
            return float(seconds(of, machine, size)[0])  # type: ignore[arg-type]

        plain = lasts(graph, 1)
        draft = lasts(outside, 1) + part * lasts(inside, 1)

        def round_of(ahead: int, taken: float) -> tuple[float, float]:
            """(seconds, tokens) of a round: one more draft step than drafts, and the rest of the layers on all of them."""
            check = lasts(outside, ahead + 1) + (1 - part) * lasts(inside, ahead + 1)
            return (ahead + 1) * draft + check, Speculation(ahead, taken).taken

        whole, gives = round_of(self.ahead, self.taken)
        values = {"speedup": plain * gives / whole, "token": whole / gives, "plain_token": plain, "tokens_per_check": gives,
                  "draft_share": (self.ahead + 1) * draft / whole}  # fmt: skip
        units = {"speedup": "x", "token": "s", "plain_token": "s", "tokens_per_check": "tokens", "draft_share": "of the time"}
        rows = []
        for ahead in (1, 2, 3, 4, 6, 8, 12):
            took, gave = round_of(ahead, self.taken)
            rows.append({"ahead": ahead, "speedup": plain * gave / took})
        return Reading(values, units, tuple(rows))
