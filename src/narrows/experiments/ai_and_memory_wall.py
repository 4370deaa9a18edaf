"""What AI and Memory Wall claims: three trends, the gap between encoders and decoders, and a decode measured on this CPU."""

from time import thread_time

from narrows.calibrate import cpu_seconds
from narrows.capture import capture
from narrows.capture.config import bundled_config, from_config
from narrows.machine import Machine, machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.ai_and_memory_wall import MemoryWall

_TOKENS = 128


def compute_growth(technique: MemoryWall) -> float:
    """Fitted growth of peak arithmetic in two years."""
    return technique.growth("compute")


def memory_growth(technique: MemoryWall) -> float:
    """Fitted growth of memory bandwidth in two years."""
    return technique.growth("memory")


def interconnect_growth(technique: MemoryWall) -> float:
    """Fitted growth of a link's rate per lane in two years."""
    return technique.growth("interconnect")


def encoder_over_decoder(technique: MemoryWall) -> float:
    """FLOP per byte of BERT-base over that of GPT-2 decoding."""
    there = machine("a100-80gb")
    encoder = technique.measure(capture("bert-base"), there, Step.forward(1, 512))
    decoder = technique.measure(capture("gpt2"), there, Step.decode(1, 512))
    return encoder.values["intensity"] / decoder.values["intensity"]


def decode_time_over_predicted(technique: MemoryWall) -> float:
    """How much longer SmolLM2 takes for a decoded token than for a prefilled one: measured over predicted."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # and processor time: what other processes take of the machine stays out
    try:
        with torch.inference_mode():
            here, (prefilled, decoded) = _this_core(), _smollm2_seconds()
    finally:
        torch.set_num_threads(threads)
    graph = from_config({**(bundled_config("smollm2-135m") or {}), "torch_dtype": "float32"}, "smollm2-135m")
    prefill = technique.measure(graph, here, Step.prefill(1, _TOKENS)).values["seconds"] / _TOKENS
    decode = technique.measure(graph, here, Step.decode(1, _TOKENS)).values["seconds"]
    return (decoded / prefilled) / (decode / prefill)


def _this_core() -> Machine:
    """One core of this CPU: the rate of a large product, and of reading a matrix far larger than the caches once."""
    import torch

    left, right, row, matrix = torch.ones(512, 1024), torch.ones(1024, 1024), torch.ones(1, 4096), torch.ones(8192, 4096)
    rate = 2 * left.numel() * 1024 / min(cpu_seconds(lambda: left @ right, rounds=3))
    read = 4 * matrix.numel() / min(cpu_seconds(lambda: row @ matrix.T, rounds=3))
    like = machine("desktop-avx2")
    return like.scaled(compute=rate / like.peak("fp32"), bandwidth=read / like.memory.bandwidth_bytes_per_s)


def _smollm2_seconds() -> tuple[float, float]:
    """Processor seconds per token of SmolLM2-135M reading a prompt, and of one decoded token after it."""
    import torch

    from narrows.samples import smollm2, text

    model, tokenizer = smollm2()
    ids = tokenizer(text()[1][: 8 * _TOKENS], return_tensors="pt")["input_ids"][:, :_TOKENS]
    prefills, decodes = [], []
    for _ in range(3):
        start = thread_time()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefills.append((thread_time() - start) / _TOKENS)
        for _ in range(4):
            start = thread_time()
            out = model(torch.argmax(out.logits[:, -1:], -1), past_key_values=out.past_key_values, use_cache=True)
            decodes.append(thread_time() - start)
    return min(prefills), min(decodes)
