"""ParaThinker: an answer finds in the cache what reading everything again would give, and what width costs."""

import pytest
import torch

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.modules.paths import think
from narrows.samples import tiny_llama
from narrows.step import Step
from narrows.techniques.decoding.parathinker import ParaThinker


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("thought", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_holds_what_reading_again_gives(paths: int, thought: int, temperature: float) -> None:
    model, batches = tiny_llama(3, tokens=12)
    ids, starts, close = batches[0]["input_ids"][:1], torch.arange(1, paths + 1), torch.tensor([[7, 8]])
    found, again = (think(model.eval(), ids, starts, thought, close, 4, temperature, reuse, 0) for reuse in (True, False))
    assert torch.equal(found.paths, again.paths) and found.paths.shape == (paths, thought)
    assert torch.equal(found.answer, again.answer) and found.answer.shape == (1, 4)
    torch.testing.assert_close(found.logits, again.logits, rtol=1e-4, atol=1e-5)
    assert (found.read_again, again.read_again) == (0, 12 + paths * thought)


def test_one_path_and_its_answer_are_plain_decoding() -> None:
    model, batches = tiny_llama(3, tokens=12)
    ids = batches[0]["input_ids"][:1]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.eval().generate(ids, max_new_tokens=9, **options)
    first, middle = plain[0, 12:13], plain[:, 16:17]
    found = think(model, ids, first, 4, middle, 4, 0.0, True, 0)
    assert torch.equal(torch.cat([found.paths, middle, found.answer], 1), plain[:, 12:])


def test_paths_without_a_start_are_refused() -> None:
    model, batches = tiny_llama(1, tokens=12)
    with pytest.raises(NarrowsError, match="3 tokens to start 8 paths"):
        ParaThinker().think(model, batches[0]["input_ids"][:1], torch.arange(3), torch.tensor([[1]]))
    with pytest.raises(NarrowsError, match="one prompt"):
        think(model, batches[0]["input_ids"], torch.arange(3), 1, torch.tensor([[1]]), 1, 0.0, True, 0)


def test_one_path_costs_nothing_more_and_each_further_one_something() -> None:
    reading = ParaThinker().measure(capture("qwen2.5-7b"), machine("a100-80gb"), Step.prefill(1, 256))
    found = [row["overhead"] for row in reading.rows]
    assert found[0] == 0 and found == sorted(found)
    assert reading.values["fits"] == 1
