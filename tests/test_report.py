"""What the reports say is right, adds up, fits the terminal, and can carry no markup or escape code of a model."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from narrows.claims import Evidence
from narrows.cost import Limit
from narrows.diagnose import Diagnosis, diagnose
from narrows.free import Bf16, Compile
from narrows.graph import BF16, FP32, DType, Graph, Op, Size
from narrows.machine import machine
from narrows.papers import papers
from narrows.plan import Plan
from narrows.prescribe import Option, Prescription, prescribe
from narrows.report import svg, tables, terminal
from narrows.report.html import report
from narrows.step import Step
from narrows.technique import built
from narrows.verify import Speed, Verification

TOKENS, HELD, PAIRS = Size.of(tokens=1), Size.of(held=1), Size.of(pairs=1)
STEPS = (Step.decode(16, 4096), Step.prefill(1, 2048), Step.train(4, 4096))
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title><script>alert(2)</script>",
    "</style><svg onload=alert(3)>",
    "' onmouseover='alert(4)",
    "&lt;b&gt;&#60;i&#62;",
    "<!--",
    "]]><iframe src=https://example.org>",
    "\x1b[31mred\x1b[0m\x07\r\n[bold]rich[/bold]",
    "right\u202eot left\ud800\u0000",
)


def block(name: str = "llama", layers: int = 32, weight: DType = BF16, names: dict[str, str] | None = None) -> Graph:
    """A decoder by hand: a norm, the matmuls of attention and MLP, the logits."""
    said = names or {}

    def matmul(op: str, inputs: int, outputs: int) -> Op:
        dims = {"rows": TOKENS, "inputs": inputs, "outputs": outputs}
        return Op(said.get(op, f"layers.*.{op}"), "linear", dims, act=weight, weight=weight, repeat=layers, saved=TOKENS * inputs)

    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
    sizes = {"queries": TOKENS, "pairs": PAIRS, "context": Size.of(context=1), "held": HELD}
    logits = {"rows": Size.of(outputs=1), "inputs": 4096, "outputs": 128256}
    ops = (
        Op("layers.*.norm", "norm", {"rows": TOKENS, "width": 4096}, act=weight, weight=weight, repeat=layers),
        matmul("q", 4096, 4096),
        Op(said.get("attn", "layers.*.attn"), "attention", {**heads, **sizes}, act=weight, cache=weight, repeat=layers),
        matmul("up", 4096, 14336),
        matmul("down", 14336, 4096),
        Op("head", "linear", logits, act=weight, weight=weight),
    )
    return Graph(name, ops, notes=("Counted as executed.",))


def at(step: Step, graph: Graph | None = None, name: str = "h100-sxm") -> Diagnosis:
    return diagnose(graph or block(), machine(name), step)


def option(*steps: object, gain: float = 1.5, fits: bool = True, needs: tuple[str, ...] = ()) -> Option:
    return Option(Plan(steps), 0.005, gain, (gain * 0.9, gain * 1.1), gain, 2.1e9, fits, False, "rounding", needs)  # type: ignore[arg-type]


def prescription(*options: Option) -> Prescription:
    why = {"1-bit-adam": "it helps train, not decode", **{p.slug: "described only" for p in papers() if p.slug not in built()}}
    return Prescription(at(STEPS[0]), (option(Compile(), gain=1.1),), options, why)


def verification(failures: tuple[str, ...] = (), model: str = "smollm2-135m") -> Verification:
    speed = {
        "prefill": Speed(0.412, 0.398, 1.04, 1.01, 1.0, (0.97, 1.06)),
        "decode": Speed(0.0412, 0.0241, 1.71, 0.99, 1.83, (1.52, 2.14)),
    }
    return Verification(
        model,
        "bf16",
        "perplexity",
        18.12,
        18.61,
        0.941,
        speed,
        538_000_000,
        141_000_000,
        140_500_000,
        "40 x 512 tokens",
        failures,
    )


def printed(show: Callable[..., None], *what: object, width: int = 80, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, **options)
    show(*what, console)
    return file.getvalue()


# --- sentences and tables


def test_headline_gives_time_interval_limit_and_what_more_would_give() -> None:
    d = at(STEPS[0])
    said = tables.headline(d)
    assert said.startswith("llama decode on h100-sxm: ")
    assert re.search(r": [\d.]+ ms a step \([\d.]+ to [\d.]+\), limited by bandwidth: \d+ % of the time reads weights", said)
    assert said.endswith(f"twice the bandwidth would give {d.what_if[Limit.BANDWIDTH][1]:.2f} x")
    assert "% of the time computes; twice the compute" in tables.headline(at(STEPS[1]))


def test_headline_of_what_does_not_fit_says_so_first() -> None:
    d = at(STEPS[2], block(layers=64))
    assert not d.fits
    said = tables.headline(d)
    assert said.startswith("llama train on h100-sxm does not fit: it needs ")
    assert "limited by compute" in said  # the limit of the time; that of the diagnosis is capacity
    assert tables.memory_table(d).title.startswith("Memory: it does not fit, ")


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_printed_ledger_adds_up_digit_for_digit(step: Step) -> None:
    table = tables.ledger_table(at(step))
    assert sum(Decimal(row[1].text) for row in table.rows) == Decimal(table.total[1].text)
    assert sum(Decimal(row[2].text.removesuffix(" %")) for row in table.rows) == Decimal("100.0")


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.integers(0, 4))
def test_apportioned_parts_add_up_and_stay_close(parts: list[float], digits: int) -> None:
    said = tables.apportion(parts, digits)
    assert abs(sum(map(Decimal, said)) - Decimal(sum(parts))) <= Decimal("0.5000001") / 10**digits
    assert all(abs(float(text) - part) < 1.0001 / 10**digits for text, part in zip(said, parts, strict=True))


def test_an_empty_step_is_reported_and_not_divided_by() -> None:
    nothing = diagnose(Graph("empty", ()), machine("h100-sxm"), STEPS[0])
    assert "nothing to do" in tables.headline(nothing)
    assert "nothing to do" in report([nothing])
    assert "nothing to do" in printed(terminal.show_diagnosis, nothing)


def test_a_ragged_step_is_described_as_a_whole() -> None:
    assert tables.describe(Step.decode([3, 1], [100, 700])) == "4 sequences, with 1,004 tokens of context in all"
    assert tables.describe(Step.prefill(1, 1)) == "1 sequence, of 1 token"


# --- terminal


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_terminal_stays_inside_its_width_and_keeps_the_figures(width: int) -> None:
    d = at(STEPS[2])
    out = printed(terminal.show_diagnosis, d, width=width)
    assert max(map(len, out.splitlines())) <= width
    assert "\x1b" not in out
    for word in ("Memory", "Where the time goes", "optimizer states", "What more of a resource", "The slowest ops", "datasheet"):
        assert word in out
    out = printed(terminal.show_prescription, prescription(option(Bf16(), Compile(), gain=1.9)), width=width)
    assert "1.90 x" in out and "1.71 to 2.09" in out and "approximate" in out
    assert max(len(line) for line in out.splitlines() if "narrows apply" not in line) <= width
    out = printed(terminal.show_verification, verification(), width=width)
    assert max(map(len, out.splitlines())) <= width


def test_an_op_is_cut_at_its_beginning_where_it_does_not_fit() -> None:
    long = block(names={"up": "model.decoder.layers.*.a_rather_long_name_of_a_block.mlp.up_projection"})
    out = printed(terminal.show_diagnosis, at(STEPS[0], long))
    assert "…" in out and "mlp.up_projection" in out and "model.decoder" not in out


def test_colour_and_plain_ascii_terminals() -> None:
    assert "\x1b[" in printed(terminal.show_diagnosis, at(STEPS[0]), force_terminal=True, color_system="standard")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=100)
    terminal.show_diagnosis(at(STEPS[2]), console)
    terminal.show_prescription(prescription(option(Bf16())), console)
    terminal.show_verification(verification(), console)
    file.flush()


def test_the_next_command_is_the_best_plan_and_one_line() -> None:
    p = prescription(option(Bf16(), Compile(), gain=1.9, needs=("calibration",)), option(Bf16(), gain=2.5, fits=False))
    command = tables.next_command(p)
    assert command == 'narrows apply llama --plan "bf16 + compile" --text FILE'
    assert Plan.parse(command.split('"')[1]) == p.best.plan  # type: ignore[union-attr]
    assert "  " + command in printed(terminal.show_prescription, p, width=40).splitlines()
    nothing = Prescription(p.before, (), (), {})
    assert tables.next_command(nothing) == ""
    assert "Nothing that narrows can apply" in printed(terminal.show_prescription, nothing)


def test_why_not_lists_the_built_and_counts_the_described() -> None:
    p = prescription()
    table = tables.why_not_table(p)
    assert [row[0].text for row in table.rows] == ["1-bit-adam"]
    described = [row for row in papers() if row.slug not in built()]
    near = sum(row.bottleneck == "memory-bandwidth" for row in described)
    assert table.note == f"Described but not built: {len(described)}, of which {near} would relieve bandwidth"


def test_a_real_prescription_is_shown() -> None:
    found = prescribe(replace(block(weight=FP32), eager=True), machine("h100-sxm"), STEPS[0])
    out = printed(terminal.show_prescription, found, width=100)
    assert "Free" in out and "bf16" in out and "Next:" in out and "Why not" in out
    assert "bf16" in report([], found)


def test_verdict_comes_first_with_the_figure() -> None:
    out = printed(terminal.show_verification, verification())
    first = out.split("\n\n")[0].replace("\n", " ")
    assert "passed" in first and "decode 1.71 x as fast (predicted 1.83 x, 1.52 to 2.14)" in " ".join(first.split())
    assert "0.99 x" in out and "0.26 x" in out and "18.61" in out
    refused = verification(("perplexity rose from 18 to 40, above 1.1 times the original",))
    assert "refused: perplexity rose from 18 to 40" in " ".join(printed(terminal.show_verification, refused).split())
    assert "Refused" in report([], None, refused)


def test_listings() -> None:
    out = printed(terminal.show_graph, block())
    assert "linear" in out and "parameters" in out and "bf16" in out
    row = {
        "slug": "awq",
        "name": "AWQ",
        "family": "quantization",
        "priority": "core",
        "status": "works",
        "claims": 3,
        "passing": 3,
    }
    out = printed(terminal.show_papers, [row])
    assert "3 of 3" in out and "1 works, 0 built, 0 described" in out
    seen = Evidence("1-bit-adam", "volume", 5.0, 5.4, float("nan"), "x less", "run", ">= 5", False, 31.2, "x", "y")
    out = printed(terminal.show_evidence, [seen])
    assert "FAIL" in out and "0 of 1 claims pass" in out
    out = printed(terminal.show_machines, [machine("h100-sxm"), machine("v100-sxm2-32gb")], width=100)
    assert "989 TFLOP/s" in out and "3.35 TB/s" in out and "fp32" in out  # bf16 falls back on a V100
    assert "llama" in printed(terminal.show_models, [block()])


# --- the page


class Page(HTMLParser):
    """Its elements, attributes and text, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def full() -> str:
    return report([at(step) for step in STEPS], prescription(option(Bf16(), Compile(), gain=1.9)), verification())


def test_the_page_asks_nobody_for_anything() -> None:
    page = Page(full())
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert value.startswith(("#", "data:")), (name, value)
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(", full())
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.elements)
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    script = re.search(r"<script>(.*?)</script>", full(), re.S)
    assert script and page.elements.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_the_script_is_short_and_the_page_is_the_same_each_time() -> None:
    assert len(files("narrows.report").joinpath("page.js").read_text().splitlines()) <= 60
    assert full() == full()
    assert report([at(STEPS[0])], stamp="2031-01-01") != report([at(STEPS[0])])


@pytest.mark.parametrize("name", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_names_are_text_whatever_they_hold(name: str) -> None:
    graph = block(name, names={"up": name, "attn": f"layers.0.{name}"})
    notes = replace(graph, notes=(name,))
    d = at(STEPS[0], notes)
    text = report([d], Prescription(d, (), (), {"1-bit-adam": name}), verification((name,), name), title=name, stamp=name)
    text.encode("utf-8")
    page = Page(text)
    assert page.elements.count("script") == 1 and not {"img", "iframe"} & set(page.elements)
    assert not [attribute for attribute, _ in page.attributes if attribute.startswith("on")]
    plain = Page(report([at(STEPS[0])], Prescription(d, (), (), {"1-bit-adam": "x"}), verification(("x",))))
    assert set(page.elements) == set(plain.elements)
    assert "\x1b" not in text and "\u202e" not in text
    # what can be seen is still seen
    assert tables.clean(name).replace(" ", "") in page.text.replace("\N{NO-BREAK SPACE}", "").replace(" ", "")
    for width in (80, 120):
        out = printed(terminal.show_diagnosis, d, width=width)
        assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
        out.encode("utf-8")
        assert "[bold]" in out or "[bold]" not in name


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.S)]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_roofline_has_a_disc_for_each_op_that_computes_under_a_roof(step: Step) -> None:
    d = at(step)
    (plot,) = drawings(svg.roofline(d))
    discs = plot.findall("circle")
    assert len(discs) == sum(bool(o.cost.flop) for o in d.ops)
    areas = sorted((float(c.attrib["r"]) ** 2 for c in discs), reverse=True)
    largest = sorted((o.seconds for o in d.ops if o.cost.flop), reverse=True)
    assert areas[0] / areas[1] == pytest.approx(largest[0] / largest[1], rel=0.05)
    words = " ".join(t.text or "" for t in plot.findall("text"))
    assert "bf16 989 TFLOP/s" in words and "fp32 67 TFLOP/s" in words and "hbm 3.35 TB/s" in words
    assert all(0 <= float(c.attrib["cx"]) <= svg.WIDTH and 0 <= float(c.attrib["cy"]) <= svg.HEIGHT for c in discs)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_area_of_the_waterline_bars_is_the_share_of_peak_reached(step: Step) -> None:
    d = at(step)
    (plot,) = drawings(svg.waterline(d))
    bars = [rect for rect in plot.iter("rect") if rect.attrib["class"].startswith("bar")]
    gaps = [rect for rect in plot.iter("rect") if rect.attrib["class"] == "gap"]
    assert len(bars) == len(gaps) == len(d.ops)
    assert all(
        float(b.attrib["y"]) >= float(g.attrib["y"]) - 0.1 for b, g in zip(bars, gaps, strict=True)
    )  # never above the water
    mean = next(line for line in plot.findall("line") if line.attrib["class"] == "mean")
    axis = next(line for line in plot.findall("line") if line.attrib["class"] == "axis")
    width, height = float(axis.attrib["x2"]) - float(axis.attrib["x1"]), float(axis.attrib["y1"]) - float(mean.attrib["y1"])
    area = sum(float(b.attrib["width"]) * float(b.attrib["height"]) for b in bars)
    assert area == pytest.approx(width * height, rel=0.02)


spots = st.tuples(st.floats(100, 900), st.floats(40, 440), st.floats(2, 30), st.text("abcdef.", min_size=1, max_size=24))


@settings(max_examples=60, deadline=None)
@given(st.lists(spots, max_size=20))
def test_labels_do_not_overlap(points: list[tuple[float, float, float, str]]) -> None:
    frame = (92.0, 20.0, 938.0, 464.0)
    found = svg.place(points, [], frame)
    boxes = [(x, y - 11, x + len(words) * 6.6, y + 3) for spot in found if spot for x, y, words in (spot,)]
    for i, a in enumerate(boxes):
        assert frame[0] <= a[0] and a[2] <= frame[2]
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@given(st.floats(-50, 50), st.floats(0.001, 1e4))
def test_axis_ticks_are_round_inside_and_few(low: float, span: float) -> None:
    ticks = svg.Axis(low, low + span, 0.0, 100.0).ticks()
    assert 2 <= len(ticks) <= 12
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_a_measured_speed_is_drawn_on_its_predicted_interval() -> None:
    text = report([], None, verification())
    drawn = [d for d in drawings(text) if d.find("path") is not None]
    assert len(drawn) == 2
    assert "predicted 1.83, 1.52 to 2.14, measured 1.71" in text
    assert "538&nbsp;MB" in text and "1.71&nbsp;x" in text


def test_ops_sort_by_value_and_the_page_holds_what_the_terminal_says() -> None:
    d = at(STEPS[0])
    text = report([d])
    assert "class=sort" in text and f'data-v="{max(o.seconds for o in d.ops):.9g}"' in text
    seen = " ".join(unescape(re.sub("<[^>]*>", " ", text)).replace("\N{NO-BREAK SPACE}", " ").split())
    assert tables.headline(d) in seen and tables.provenance(d) in seen and "Counted as executed." in seen


def test_reports_need_neither_torch_nor_a_terminal_library_to_import() -> None:
    code = (
        "import sys, json, narrows.report.html, narrows.report.terminal; "
        "print(json.dumps([m for m in ('torch', 'rich') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
