"""What NanoFlow's ablation claims, in the serving simulator: Llama-2-70B on eight A100, everything there at the start."""

from narrows.capture import capture
from narrows.experiments.serving import load
from narrows.machine import machine
from narrows.simulate.demand import Demand
from narrows.simulate.fleet import Group, rules
from narrows.simulate.workload import scaled
from narrows.techniques.serving.nanoflow import STEP, NanoFlow

OPTIMAL = 1857.0  # tokens per second and A100: the paper's bound by arithmetic (section 3.5)


def demand(prompt: float, output: float) -> Demand:
    """4,000 requests that arrive within a second."""
    group = Group(capture("llama-2-70b"), machine("a100-80gb"), rules("vllm-v1"), devices=8)
    return Demand(group, tuple(scaled(load((prompt, 0.3), (output, 0.3), 8192, 4000), 4000.0)))


def throughput(technique: NanoFlow, prompt: float, output: float) -> float:
    """Tokens read and given per second and device."""
    wanted = demand(prompt, output)
    found = technique.deploy(wanted)
    seen = wanted.play(found)
    return (seen.prompts + seen.tokens) / seen.seconds / found.devices


def decode_heavy(technique: NanoFlow) -> float:
    """Throughput over the same without overlap, where answers are longer than prompts."""
    return throughput(technique, 512, 1024) / throughput(technique.baseline(), 512, 1024)


def prefill_heavy(technique: NanoFlow) -> float:
    """Throughput over the same without overlap, where only prompts are read."""
    return throughput(technique, 512, 1) / throughput(technique.baseline(), 512, 1)


def cut(technique: NanoFlow) -> float:
    """By how much the products and collectives of a step's parts together take longer than the step's."""
    times = technique.baseline().deploy(demand(512, 512)).group.times()
    return technique.parts * times.rows(STEP // technique.parts) / times.rows(STEP) - 1


def best_of_optimal(technique: NanoFlow) -> float:
    """The greatest throughput over the bound, of four mixes of prompts and answers."""
    return max(throughput(technique, *mix) for mix in ((512, 1), (512, 512), (1024, 512), (512, 1024))) / OPTIMAL
