"""The pages in docs/results, and the tables of other pages, are exactly what the stored results give."""

import re
from pathlib import Path

import pytest

from benchmarks.pages.model import (
    FAILS,
    HOLDS,
    OPEN,
    PARTLY,
    PM,
    Check,
    Interval,
    Table,
    factor,
    said,
    short,
    span,
    verdict,
)
from benchmarks.pages.overview import BENCHMARKS, FOLDERS
from benchmarks.pages.render import duration, wrapped
from benchmarks.pages.written import CLAIMS, FOLDER, filled, written

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made():
    return written()


def check(met, counted=True):
    return Check("", "", "", met, counted)


def test_pages_are_what_the_results_give(made):
    stale = [name for name, text in made.items() if (ROOT / name).read_text(encoding="utf-8") != text]
    assert not stale, f"{stale} are not what the results give: python -m benchmarks.pages"


def test_every_claim_has_its_page_and_no_page_is_left_over(made):
    assert len(CLAIMS) == len({claim.slug for claim in CLAIMS}) == 14
    pages = {name for name in made if name.startswith(f"{FOLDER}/")}
    assert pages == {str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob("*.md")}
    assert all(f"({claim.slug}.md)" in made[f"{FOLDER}/index.md"] for claim in CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.slug)
def test_a_page_says_what_a_reader_asks(claim, made):
    text = made[f"{FOLDER}/{claim.slug}.md"]
    assert re.search(rf"\*\*Verdict: ({HOLDS}|{PARTLY}|{FAILS}|{OPEN})\.\*\*", text)
    assert (ROOT / "results" / claim.figure[0]).is_file()
    for part in ("**The paper says**", "## What was checked", "## Numbers", "## Where it loses", "## Run it again"):
        assert part in text
    assert all(f"results/{source}" in text and (ROOT / "results" / source).is_file() for source in claim.sources)


def test_every_stored_result_is_listed():
    folders = {path.name for path in (ROOT / "results").iterdir() if path.is_dir()}
    assert folders == {*FOLDERS, "benchmarks"}
    # JSON of breadth.py is stored as the lines it is made of; those of the studies lie beside their JSON.
    files = {
        path.name.removesuffix(".json").split(".raw.")[0] for path in (ROOT / "results/benchmarks").glob("*.json*")
    }
    assert files == set(BENCHMARKS)


def test_a_block_written_by_hand_is_made_anew():
    typed = "before\n<!-- made: memory -->\ntyped\n<!-- end -->\nafter"
    assert "typed" not in filled(typed)
    assert filled(filled(typed)) == filled(typed)
    assert (filled(typed)[:7], filled(typed)[-6:]) == ("before\n", "\nafter")


def test_a_verdict_is_made_of_what_counts_alone():
    assert verdict([check(True), check(True)]) == HOLDS
    assert verdict([check(True), check(False)]) == PARTLY
    assert verdict([check(False), check(True, counted=False)]) == FAILS
    assert verdict([check(True), check(False, counted=False)]) == HOLDS
    blind = Check("", "", "", False, blind=True)
    assert verdict([blind, blind]) == OPEN
    assert verdict([blind, check(False)]) == FAILS
    with pytest.raises(ValueError, match="counts"):
        verdict([check(True, counted=False)])


def test_nothing_follows_from_an_interval_that_holds_the_value_or_from_a_run_that_diverged():
    assert Interval(-2.0, 1.0).below(0)
    assert not Interval(-1.0, 1.0).below(0)
    assert Interval(2.0, 1.0).above(0)
    lost = Interval.of([1.0, None, 2.0])
    assert not lost.below(0)
    assert not lost.above(0)
    assert lost.shown() == factor(lost) == "diverged"
    assert Interval(-1e-9, 0.1).shown(2) == f"+0.00{PM}0.10"
    assert not Interval.of([1.0]).below(2)


def test_numbers_are_written_as_a_reader_reads_them():
    assert [short(113.7), short(0.0234), short(2.04e-13)] == ["110", "0.023", "2e-13"]
    assert span([1.0, 1.001]) == "1"
    assert span([0.5, 110.2]) == "0.5 to 110"
    assert [duration(s) for s in (5, 59, 600, 7300)] == ["5.0 s", "59 s", "10 min", "2.0 h"]
    assert wrapped("- a " + "word " * 40).count("\n  word") == 1


def test_prose_that_the_results_no_longer_bear_out_is_an_error():
    assert said("so it is", True) == "so it is"
    with pytest.raises(ValueError, match="no longer say: so it is"):
        said("so it is", False)
    with pytest.raises(ValueError, match="2 cells in a row of 1"):
        Table("a table", ["head"], [["1", "2"]]).shown()
