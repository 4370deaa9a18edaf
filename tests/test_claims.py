"""Evidence: what is kept must pass, and fail for the baseline; measured again under the `claims` mark."""

import pytest

from narrows import claims
from narrows.errors import NarrowsError
from narrows.technique import Claim, built, techniques

BUILT = techniques()
CLAIMS = {f"{slug}:{claim.name}": (slug, claim) for slug, t in BUILT.items() for claim in t.card.claims}


@pytest.mark.parametrize(("slug", "claim"), CLAIMS.values(), ids=CLAIMS.keys())
def test_kept_evidence_passes_and_its_baseline_fails(slug: str, claim: Claim) -> None:
    (row,) = [e for e in claims.kept() if (e.slug, e.claim) == (slug, claim.name)]
    assert row.tolerance == claim.tolerance, "the tolerance changed: measure again (`make claims`)"
    assert row.passed == claim.holds(row.ours)
    assert row.passed, "it does not hold: say so in the card, or find out why"
    assert row.baseline is not None
    assert not claim.holds(row.baseline), "a check that its baseline passes shows nothing"


def test_kept_evidence_belongs_to_claims_that_exist() -> None:
    assert {(e.slug, e.claim) for e in claims.kept()} == {(slug, claim.name) for slug, claim in CLAIMS.values()}


def test_status_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    slug = built()[0]
    assert claims.status(slug) == "works"
    monkeypatch.setattr(claims, "kept", lambda: ())
    assert claims.status(slug) == "built"
    assert claims.status("flashfftconv") == "described"


def test_a_described_paper_cannot_be_reproduced() -> None:
    with pytest.raises(NarrowsError, match="described"):
        claims.reproduce("flashfftconv")


def test_evidence_is_recorded_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(claims, "results_file", lambda: tmp_path / "claims.csv")
    claims.kept.cache_clear()
    one = claims.Evidence("awq", "a", None, 1.5, None, "x", "run", ">= 1", True, 0.1, "m", "v")
    claims.record([one])
    other = claims.Evidence("awq", "b", 2.0, 1.25, 0.5, "x", "run", ">= 1", True, 0.1, "m", "v")
    claims.record([other])
    assert claims.kept() == (one, other)
    claims.kept.cache_clear()


@pytest.mark.claims
@pytest.mark.parametrize("slug", BUILT)
def test_claims_hold_when_measured_again(slug: str) -> None:
    for row in claims.reproduce(slug, with_baseline=True):
        claim = next(c for c in BUILT[slug].card.claims if c.name == row.claim)
        assert row.passed, row
        assert row.baseline is not None
        assert not claim.holds(row.baseline), row
