"""The plan of a deployment: as good as trying everything, confirmed by simulation, and launched by what it says."""

import json
import math
import os
import re
import shlex
import signal
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.capture.config import longest
from narrows.cli import cli
from narrows.cli.options import interruptible
from narrows.diagnose import seconds
from narrows.emit import ENGINES, emit_server, sglang_0_5, vllm_0_19
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.report.serving import deployment_table, plan_sentence
from narrows.search.deployments import EVERY, Config, Job, Kind, Side, Space, served
from narrows.search.screen import screen
from narrows.search.serve import _scales, as_json, plan_serve, taken_for_granted
from narrows.simulate.asked import saturation
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.requests import Request
from narrows.simulate.speculation import Speculation
from narrows.simulate.workload import Lengths, generate
from narrows.step import Step

GRAPH, L4, H100 = capture("smollm2-135m"), machine("l4"), machine("h100-sxm")
LOAD = tuple(generate(60.0, 300, Lengths(300, 60, 0.5, 0.5), seed=2))
JOB = Job(GRAPH, (Kind(L4, 4),), LOAD, ttft=0.2, tpot=0.01)
SMALL = Space(tensor=(1,), pipeline=(1,), experts=(1,), precision=("own",), cache=("own",), max_sequences=(8, 64),
              max_tokens=(256, 2048), apart=(False,))  # fmt: skip


def tried(job: Job, space: Space) -> list[tuple[float, int]]:
    """(share within the limits, devices) of every deployment of one device a replica, together, by simulation alone."""
    found = []
    for sequences in space.max_sequences:
        for tokens in space.max_tokens:
            for replicas in range(1, job.kinds[0].count + 1):
                own = rules(job.engine, max_sequences=sequences, max_tokens=tokens)
                seen = serve(job.requests, Group(job.graph, L4, own, 1, replicas), ttft=job.ttft, tpot=job.tpot)
                found.append((seen.good / len(job.requests), replicas))
    return found


def test_the_plan_is_as_cheap_as_the_cheapest_of_all_that_there_are() -> None:
    plan = plan_serve(JOB, SMALL)
    cheapest = min(devices for share, devices in tried(JOB, SMALL) if share >= JOB.share)
    assert plan.best[0].keeps and plan.best[0].config.devices == cheapest
    assert plan.evaluated == 4


def test_every_choice_is_what_a_simulation_of_it_gives() -> None:
    plan = plan_serve(JOB, replace(EVERY, tensor=(1,), pipeline=(1, 2)))
    assert plan.evaluated > 100
    for choice in plan.best:
        again = serve(JOB.requests, *choice.config.groups(JOB), ttft=JOB.ttft, tpot=JOB.tpot)
        assert choice.outcome is not None and again.as_json() == choice.outcome.as_json()
        assert choice.attained == again.good / len(LOAD) and choice.keeps == (choice.attained >= JOB.share)
        for name, here in (("goodput", choice.goodput), ("ttft_s", choice.ttft["mean"]), ("tpot_s", choice.tpot["mean"])):
            low, high = choice.interval[name]
            assert low <= here <= high
    costs = [c.config.dollars_per_hour for c in plan.best if c.keeps]
    assert costs[:-1] == sorted(costs[:-1])  # type: ignore[type-var]  # the last may be the best in the model's own formats
    assert any(choice.config.exact for choice in plan.best)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("model", "experts"), [("llama-3.1-8b", {1}), ("mixtral-8x7b", {1, 4})])
def test_screening_saturates_where_the_simulation_does(apart: bool, model: str, experts: set[int]) -> None:
    load = tuple(generate(50.0, 200, Lengths(800, 200), seed=1))
    job = Job(capture(model), (Kind(H100, 8),), load, 5.0, 0.1, speculations=() if apart else (Speculation(3, 0.7, GRAPH),))
    space = Space((1, 2), (1, 2), (1, 4), ("own",), ("own",), (32, 128), (2048, 8192), (apart,))
    points = screen(job, space).points
    assert {p.config.decode.pipeline for p in points} == {1, 2} and {p.config.decode.experts for p in points} == experts
    assert {p.config.speculation is None for p in points} == {True, apart}
    for point in points[:: max(len(points) // 7, 1)]:
        assert point.full == pytest.approx(saturation(job.requests, *point.config.groups(job)), rel=0.3), str(point.config)


def test_intervals_are_the_load_played_with_steps_at_both_ends_of_theirs() -> None:
    choice = plan_serve(JOB, SMALL).best[0]
    (low, high), _ = _scales(JOB, choice)
    group, _ = choice.config.groups(JOB)
    step = seconds(GRAPH, L4, Step.decode(choice.point.batch, JOB.held))
    read = seconds(GRAPH, L4, JOB.typical)
    work = [JOB.output / choice.point.batch * float(a) + float(b) for a, b in zip(step, read, strict=True)]
    assert low <= work[1] / work[0] < 1 < work[2] / work[0] <= high  # never narrower than the cost model
    slow = serve(JOB.requests, replace(group, scale=high), ttft=JOB.ttft, tpot=JOB.tpot)
    fast = serve(JOB.requests, replace(group, scale=low), ttft=JOB.ttft, tpot=JOB.tpot)
    assert choice.interval["ttft_s"] == (fast.ttft.mean, slow.ttft.mean)
    assert choice.interval["tpot_s"] == (fast.tpot.mean, slow.tpot.mean)


def test_what_a_choice_rests_on_is_said() -> None:
    rests = taken_for_granted(Config("vllm-v1", "int4", "fp8", Side(H100, 1, 1, 8, 64, experts=2), None, Speculation(3, 0.7)))
    weights, cache, draft, experts = rests
    assert weights.startswith("weights=int4: perplexity times ") and "results/verified.csv" in weights
    assert cache == "cache=fp8: what it costs in quality was not measured."
    assert "70%" in draft and "not measured" in draft and experts.startswith("experts: ")
    assert not taken_for_granted(Config("vllm-v1", "own", "own", Side(H100, 1, 1, 8, 64)))


def test_a_draft_pays_where_few_sequences_run_and_is_left_out_where_many_do() -> None:
    load = tuple(generate(2.0, 60, Lengths(500, 100, 0.5, 0.5), seed=3))
    job = Job(capture("llama-3.1-8b"), (Kind(H100, 1),), load, ttft=1.0, tpot=0.0075, speculations=(Speculation(3, 0.8, GRAPH),))
    best = plan_serve(job, SMALL).best[0]
    assert best.keeps and best.config.speculation is not None  # one token after another is too slow
    many = replace(job, requests=tuple(replace(r, arrival=r.arrival // 20) for r in load * 4), tpot=0.1)
    found = {p.config.speculation is None: p.full for p in screen(many, SMALL).points if p.config.decode.max_tokens == 2048
             and p.config.decode.max_sequences == 64}  # fmt: skip
    assert found[True] != found[False]


def test_what_no_deployment_can_keep_is_said() -> None:
    plan = plan_serve(replace(JOB, ttft=1e-4), SMALL)
    assert not plan.best and plan.evaluated == 4
    assert any(line.startswith("ttft: too slow") for line in plan.why_not)
    assert "nothing" in plan_sentence(plan)


def test_a_load_that_all_devices_cannot_carry_is_said() -> None:
    plan = plan_serve(replace(JOB, requests=tuple(replace(r, arrival=r.arrival // 100) for r in LOAD)), SMALL)
    assert plan.best and not any(choice.keeps for choice in plan.best)
    assert "more devices are needed" in plan.why_not[0] and plan.best[0].config.devices == 4


def test_requests_that_come_at_once_take_all_devices() -> None:
    job = replace(JOB, requests=tuple(replace(r, arrival=0) for r in LOAD))
    assert math.isinf(job.rate) and plan_serve(job, SMALL).best[0].config.devices == 4


def test_a_model_that_has_no_room_is_refused_with_the_reason() -> None:
    job = replace(JOB, graph=capture("llama-3.1-70b"))
    plan = plan_serve(job, SMALL)
    assert not plan.best and any(line.startswith("memory: ") for line in plan.why_not)


def test_stopping_gives_what_is_known_so_far() -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 1

    plan = plan_serve(JOB, EVERY, keep=20, stop=stop)
    confirmed = [choice for choice in plan.best if choice.outcome is not None]
    assert len(confirmed) == 1 < len(plan.best)
    assert all(not choice.keeps and choice.attained is None for choice in plan.best if choice.outcome is None)
    assert len(deployment_table(plan).rows) == len(plan.best)


def test_json_is_the_contract() -> None:
    found = json.loads(json.dumps(as_json(plan_serve(JOB, SMALL))))
    assert {"evaluated", "seconds", "best", "why_not"} <= found.keys()
    best = found["best"][0]
    wanted = {"config", "goodput", "ttft_s", "tpot_s", "cost_per_mtoken", "energy_j_per_token", "interval"}
    assert wanted <= best.keys() and best["confirmed_by_simulation"] is True
    assert {"mean", "p50", "p90", "p99"} == best["ttft_s"].keys() and best["energy_j_per_token"] > 0
    hours = best["config"]["devices"] * (L4.price_per_hour or 0) / 3600
    assert best["cost_per_mtoken"] == pytest.approx(hours / (best["goodput"] / best["attained"] * 60) * 1e6, rel=0.1)
    assert best["goodput"] == pytest.approx(best["attained"] * found["rate"], rel=0.01)


def test_a_load_that_is_over_before_it_has_begun_is_noted() -> None:
    assert not plan_serve(JOB, SMALL).notes
    short = plan_serve(replace(JOB, requests=LOAD[:20]), SMALL)
    assert short.best[0].keeps and "more requests" in short.notes[0]


def test_machines_without_links_serve_together() -> None:
    found = screen(replace(JOB, kinds=(Kind(replace(L4, links=(), sources={}), 4),)), replace(SMALL, apart=(False, True)))
    assert found.points and all(point.config.prefill is None for point in found.points)
    assert any(reason.startswith("links: ") for reason in found.reasons)


def test_other_formats_are_left_out_where_machine_or_model_lacks_them() -> None:
    a100 = machine("a100-80gb")
    with pytest.raises(NarrowsError, match="fp8"):
        served(GRAPH, "fp8", "own", a100)
    assert served(GRAPH, "int8", "own", a100).weight_bytes < 0.7 * GRAPH.weight_bytes
    found = screen(replace(JOB, kinds=(Kind(a100, 4),)), replace(EVERY, tensor=(1,), apart=(False,)))
    assert {p.config.precision for p in found.points} == {"own", "int8", "int4"}


def test_two_kinds_of_machines_can_share_the_work() -> None:
    found = screen(replace(JOB, kinds=(Kind(L4, 2), Kind(H100, 2))), replace(SMALL, apart=(True,)))
    pairs = {(p.config.prefill.machine.name, p.config.decode.machine.name) for p in found.points if p.config.prefill}
    assert {("l4", "h100-sxm"), ("h100-sxm", "l4")} <= pairs
    for point in found.points:
        used = {kind.machine.name: 0 for kind in (Kind(L4, 2), Kind(H100, 2))}
        for side in point.config.sides:
            used[side.machine.name] += side.devices
        assert max(used.values()) <= 2


@pytest.mark.parametrize(
    ("change", "says"),
    [({"requests": ()}, "requests"), ({"kinds": ()}, "kinds"), ({"engine": "static"}, "batch"), ({"ttft": 0.0}, "above 0"),
     ({"share": 1.0}, "below 1"), ({"engine": "vllm-v2"}, "vllm-v1")],
)  # fmt: skip
def test_a_job_without_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(NarrowsError, match=says):
        plan_serve(replace(JOB, **change), SMALL)


# ---- ways to lay a replica over devices ----


def test_stages_share_the_layers_and_pass_on_what_lies_between() -> None:
    graph = capture("llama-3.1-8b")
    whole, staged = Group(graph, H100, rules("vllm-v1")), Group(graph, H100, rules("vllm-v1"), pipeline=4)
    assert staged.engines == 4 and staged.token_bytes() == whole.token_bytes()
    freed = graph.weight_bytes * 3 / 4 / (whole.token_bytes() * 16)
    assert staged.room() - whole.room() == pytest.approx(freed, rel=0.01)  # less a buffer to send from
    (send,) = [op for op in staged.share if op.kind == "send"]
    assert (send.repeat, float(send.sized(Step.decode(7, 100))["elements"])) == (3, 7 * 4096)
    slower = staged.times().rows(512) - whole.times().rows(512)
    assert 0 < slower < 0.05 * whole.times().rows(512)
    with pytest.raises(NarrowsError, match="layers"):
        Group(graph, H100, rules("vllm-v1"), pipeline=33).times()


def test_devices_that_share_experts_keep_their_part_of_them() -> None:
    graph = capture("mixtral-8x7b")
    apart, spread = Group(graph, H100, rules("vllm-v1"), 2), Group(graph, H100, rules("vllm-v1"), 2, experts=4)
    experts = sum(float(op.weight_bytes) for op in graph.find("expert"))
    assert spread.share.weight_bytes == pytest.approx(graph.weight_bytes - 0.75 * experts)
    assert spread.room() - apart.room() == pytest.approx(0.75 * experts / 2 / (apart.token_bytes() * 16), rel=0.01)
    assert {op.kind for op in spread.share} - {op.kind for op in graph} == {"all_to_all"}
    assert spread.times().rows(8) < apart.times().rows(8)  # few tokens: a device reads fewer of the experts they chose


# ---- launch commands ----

ONE = Side(H100, 2, 3, 128, 4096)
TOGETHER = Config("vllm-v1", "fp8", "fp8", ONE)
APART = Config("vllm-v1", "own", "own", ONE, replace(ONE, tensor=1, replicas=2, max_tokens=8192))


def flags(text: str) -> list[dict[str, str]]:
    """The flags of every command, as a shell would read them."""
    commands = [shlex.split(block, comments=True) for block in text.replace("\\\n", " ").split("\n")]
    return [dict(pairwise(c)) for c in commands if c]


def test_vllm_together() -> None:
    (found,) = flags(emit_server("vllm", TOGETHER, "meta-llama/Llama-3.1-8B", context=8192))
    assert found["serve"] == "meta-llama/Llama-3.1-8B"
    assert (found["--tensor-parallel-size"], found["--data-parallel-size"]) == ("2", "3")
    assert (found["--max-num-seqs"], found["--max-num-batched-tokens"], found["--max-model-len"]) == ("128", "4096", "8192")
    assert (found["--quantization"], found["--kv-cache-dtype"], found["--gpu-memory-utilization"]) == ("fp8", "fp8", "0.9")


def test_vllm_apart_has_a_command_for_each_side() -> None:
    reader, writer = flags(emit_server("vllm-0.19", APART, "m"))
    assert (reader["--max-num-batched-tokens"], writer["--max-num-batched-tokens"]) == ("8192", "4096")
    for side in (reader, writer):
        assert json.loads(side["--kv-transfer-config"])["kv_connector"] == "NixlConnector"
        assert "--quantization" not in side and "--data-parallel-size" not in side


def test_sglang_together_and_apart() -> None:
    (found,) = flags(emit_server("sglang", replace(TOGETHER, engine="sglang"), "a model"))
    assert (found["--model-path"], found["--tp-size"], found["--dp-size"]) == ("a model", "2", "3")
    assert (found["--max-running-requests"], found["--chunked-prefill-size"]) == ("128", "4096")
    text = emit_server("sglang", replace(APART, engine="sglang"), "m")
    reader, writer, router = flags(text)
    assert (reader["--disaggregation-mode"], writer["--disaggregation-mode"]) == ("prefill", "decode")
    assert "--pd-disaggregation" in router and text.count("--prefill http") == 2 and text.count("--decode http") == 3


def test_weights_of_few_bits_ask_for_a_checkpoint() -> None:
    for name, engine in (("vllm", "vllm-v1"), ("sglang", "sglang")):
        for precision, form in (("int8", "W8A16"), ("int4", "W4A16")):
            assert form in emit_server(name, replace(TOGETHER, engine=engine, precision=precision), "m").splitlines()[0]


SPREAD = replace(ONE, tensor=1, experts=4)
STAGED = replace(ONE, pipeline=2)
DRAFTED = Speculation(3, 0.7, GRAPH)


def test_experts_stages_and_drafts_in_vllm() -> None:
    (found,) = flags(emit_server("vllm", replace(TOGETHER, decode=SPREAD, speculation=Speculation(4, 0.5)), "m"))
    assert (found["--data-parallel-size"], found["--max-num-seqs"]) == ("4", "128")  # of a rank; a command is one replica
    assert json.loads(found["--speculative-config"])["method"] == "ngram"
    (found,) = flags(emit_server("vllm", replace(TOGETHER, decode=STAGED, speculation=DRAFTED), "m"))
    assert (found["--pipeline-parallel-size"], found["--data-parallel-size"], found["--max-num-seqs"]) == ("2", "3", "256")
    draft = {"method": "draft_model", "model": GRAPH.name, "num_speculative_tokens": 3}
    assert json.loads(found["--speculative-config"]) == draft


def test_experts_stages_and_drafts_in_sglang() -> None:
    own = replace(TOGETHER, engine="sglang")
    (found,) = flags(emit_server("sglang", replace(own, decode=SPREAD), "m"))
    assert [found[f"--{name}"] for name in ("tp-size", "attn-dp-size", "ep-size")] == ["4", "4", "4"]
    assert (found["--max-running-requests"], found["--chunked-prefill-size"]) == ("512", "16384") and "--dp-size" not in found
    (found,) = flags(emit_server("sglang", replace(own, decode=STAGED, speculation=DRAFTED), "m"))
    assert (found["--pp-size"], found["--max-running-requests"], found["--speculative-algorithm"]) == ("2", "256", "STANDALONE")
    assert (found["--speculative-num-steps"], found["--speculative-num-draft-tokens"]) == ("3", "4")
    with pytest.raises(NarrowsError, match="speculation"):
        emit_server("sglang", replace(own, decode=SPREAD, speculation=DRAFTED), "m")


@given(
    st.sampled_from(["own", "fp8", "int8", "int4"]), st.sampled_from(["own", "fp8"]), st.sampled_from([ONE, SPREAD, STAGED]),
    st.sampled_from([None, ONE, SPREAD, STAGED]), st.sampled_from([None, DRAFTED, Speculation(4, 0.5)]), st.integers(0, 9000),
)  # fmt: skip
def test_no_flag_is_emitted_that_was_not_found_in_the_engine_s_source(
    precision: str, cache: str, decode: Side, prefill: Side | None, drafted: Speculation | None, context: int
) -> None:
    for engine, template in (("vllm-v1", vllm_0_19), ("sglang", sglang_0_5)):
        config = Config(engine, precision, cache, decode, prefill, drafted)
        if engine == "sglang" and drafted and decode.experts > 1:
            continue
        text = emit_server(engine.split("-")[0], config, "a/model", context)
        used = {
            word for line in text.splitlines() if not line.startswith("#") for word in re.findall(r"(?<!\S)--([a-z-]+)", line)
        }
        assert used and used <= template.FLAGS


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("vllm", {"engine": "sglang"}, "engine"),
        ("sglang", {}, "engine"),
        ("vllm", {"precision": "fp6"}, "weights"),
        ("vllm", {"cache": "int8"}, "cache"),
    ],
)
def test_what_an_engine_has_not_is_refused_by_name(name: str, change: dict[str, str], part: str) -> None:
    with pytest.raises(NarrowsError) as refusal:
        emit_server(name, replace(TOGETHER, **change), "m")  # type: ignore[arg-type]
    assert part in refusal.value.where


def test_templates_are_named_with_their_versions() -> None:
    with pytest.raises(NarrowsError, match="no template"):
        emit_server("tgi", TOGETHER, "m")
    assert all(name.rpartition("-")[2][0].isdigit() for name in ENGINES)


# ---- the command line ----


def run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli, ["plan", "serve", "smollm2-135m", *words])
    if isinstance(found.exception, NarrowsError):
        raise found.exception
    return found.exit_code, found.stdout


def test_the_command_plans_and_emits() -> None:
    words = ("-m", "l4:2", "--rate", "30", "--requests", "200", "-p", "300", "-o", "60", "--ttft", "1", "--tpot", "0.05",
             "--split", "together", "--weights", "own")  # fmt: skip
    code, text = run(*words, "--emit", "vllm", "--json")
    found = json.loads(text)
    assert code == 0 and found["best"][0]["attained"] >= 0.9 and found["settings"].startswith("vllm serve smollm2-135m")
    assert run(*words)[0] == 0
    assert run(*words[:-6], "--ttft", "0.0001", "--json")[0] == 1


def test_a_cluster_brings_its_own_number_of_devices() -> None:
    code, text = run("-m", "dgx-h100", "--rate", "30", "--requests", "100", "--confirm", "0", "--json")
    assert code == 1 and not json.loads(text)["best"][0]["confirmed_by_simulation"]  # what nothing confirmed is no answer
    for words, says in ((("-m", "nothing:3"), "no machine"), (("-m", "l4:0"), "at least 1"),
                        (("-m", "l4", "--draft", "smollm2-135m"), "go together")):  # fmt: skip
        with pytest.raises(NarrowsError, match=says):
            run(*words, "--rate", "1")


def test_the_context_of_a_model_is_known_from_its_config(tmp_path: Any) -> None:
    assert longest("llama-3.1-8b") == 131072 and longest("no-such-model") == 0 and longest(tmp_path) == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"max_position_embeddings": 77}}))
    assert longest(tmp_path) == 77 == longest(tmp_path / "config.json")
    words = ["simulate", "serve", "smollm2-135m", "-m", "l4", "--rate", "5", "--requests", "20", "-p", "99", "--spread", "0"]
    found = json.loads(CliRunner().invoke(cli, [*words, "-o", "9", "--context", "100", "--json"]).stdout)
    assert (found["requests"], found["rejected"]) == (0, 20)


def simulated(*words: str) -> dict[str, Any]:
    asked = ["simulate", "serve", "smollm2-135m", "-m", "l4", "-p", "200", "-o", "40", "--json", *words]
    found = CliRunner().invoke(cli, asked)
    if isinstance(found.exception, NarrowsError):
        raise found.exception
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def test_the_command_s_fields_are_the_contract() -> None:
    found = simulated("--rate", "20", "--requests", "100")
    assert {"requests", "simulated_seconds", "cpu_seconds", "peak_rss_bytes", "ttft_s", "tpot_s", "e2e_s",
            "throughput_tokens_per_s", "preemptions", "ledger"} <= found.keys()  # fmt: skip
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert {"mean", "p50", "p90", "p99"} == found[name].keys()
    assert sum(found["ledger"].values()) == pytest.approx(found["e2e_s"]["mean"])


def test_a_load_past_saturation_ends_with_a_statement() -> None:
    assert any("Past saturation" in note for note in simulated("--rate", "5000", "--requests", "2000")["notes"])
    assert not simulated("--rate", "5", "--requests", "100")["notes"]


def test_clients_who_wait_for_their_answers_keep_as_many_inside() -> None:
    found = simulated("--clients", "8", "--requests", "400")
    assert found["requests"] == 400
    inside = found["requests_per_s"] * found["e2e_s"]["mean"]  # Little's law
    assert inside == pytest.approx(8, rel=0.05)  # the last ones run dry
    assert simulated("--clients", "8", "--requests", "400", "-r", "2")["requests_per_s"] > found["requests_per_s"]
    for words in (("--clients", "0"), ("--clients", "8", "--saturation")):
        with pytest.raises(NarrowsError, match="set the rate themselves"):
            simulated(*words)


def test_hours_give_as_many_requests_as_come_in_them() -> None:
    assert simulated("--rate", "2", "--hours", "0.05")["requests"] == 360
    assert simulated("--load", "azure-2023-conv", "--hours", "0.01", "--swing", "0.5")["requests"] == round(36 * 5.53)
    with pytest.raises(NarrowsError, match="known"):
        simulated("--rate", "2", "--hours", "1", "--requests", "10")


def test_ctrl_c_is_heard_once_and_obeyed_twice() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_requests_after_an_interruption_are_not_played() -> None:
    from narrows.cli.serving import told

    asked = iter([False, False, True])
    played = list(told([Request(0, 1, 1)] * 5, lambda text: None, lambda: next(asked)))
    assert len(played) == 2
