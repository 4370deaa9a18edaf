"""The catalogue holds 484 complete rows, and each slug has a module name of its own."""

import time

import pytest

from narrows.errors import NarrowsError
from narrows.papers import module_name, paper, papers

FAMILIES = {
    "applications", "architectures-general", "architectures-vision", "attention", "communication", "compilers-testing",
    "conditional-compute", "continual-learning", "data-curation", "decoding", "diffusion-generation", "distillation",
    "eda-code-agents", "federated", "frameworks", "gnn-recsys-retrieval", "hardware-codesign",
    "information-interpretability", "kv-cache", "low-rank-codebook-sharing", "merging-modularity", "moe", "nas",
    "optimization-dynamics", "peft", "profiling-cost-models", "quantization", "scaling-laws", "sequence-models", "serving",
    "sparsity-pruning", "training-memory-offload", "training-parallelism",
}  # fmt: skip


def test_484_unique_complete_rows() -> None:
    rows = papers()
    assert len(rows) == len({p.slug for p in rows}) == 484
    assert {p.family for p in rows} == FAMILIES
    assert {p.priority for p in rows} == {"core", "wide", "fringe"}
    assert {p.route for p in rows} == {"apply", "kernel", "measure", "outside", "search", "simulate", "train"}
    for p in rows:
        assert all((p.name, p.kind, p.bottleneck)), p.slug
        assert min(len(p.mechanism), len(p.works_when)) >= 40 and len(p.title) >= 10, p.slug


def test_a_slug_finds_its_row_and_a_misspelt_one_its_neighbours() -> None:
    assert paper("awq").family == "quantization" and paper("1-bit-adam").route == "train"
    with pytest.raises(NarrowsError, match="pyramidkv"):
        paper("pyramid-kv")


@pytest.mark.parametrize(
    ("slug", "module"),
    [("1-bit-adam", "one_bit_adam"), ("2bp", "two_bp"), ("4-3-phases", "four_3_phases"), ("1bit-merging", "one_bit_merging"),
     ("training-memory-offload", "training_memory_offload"), ("awq", "awq")],
)  # fmt: skip
def test_module_names(slug: str, module: str) -> None:
    assert module_name(slug) == module


def test_every_slug_and_family_has_its_own_identifier() -> None:
    for words in ({p.slug for p in papers()}, FAMILIES):
        names = {module_name(w) for w in words}
        assert len(names) == len(words) and all(n.isidentifier() and n.islower() for n in names)


@pytest.mark.parametrize("bad", ["", "../etc", "a b", "A", "-a", "a--b", "a\n"])
def test_what_is_no_slug_is_refused(bad: str) -> None:
    with pytest.raises(NarrowsError, match="no slug"):
        module_name(bad)


def test_reading_is_fast() -> None:
    taken = []
    for _ in range(5):
        papers.cache_clear()
        start = time.process_time()
        papers()
        taken.append(time.process_time() - start)
    assert min(taken) < 0.015
