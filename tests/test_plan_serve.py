"""The plan of a deployment: as good as trying everything, confirmed by simulation, and launched by what it says."""

import json
import math
import os
import shlex
import signal
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from click.testing import CliRunner

from narrows.capture import capture
from narrows.capture.config import longest
from narrows.cli import cli
from narrows.cli.options import interruptible
from narrows.emit import ENGINES, emit_server
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.report.serving import deployment_table, plan_sentence
from narrows.search.screen import EVERY, Config, Job, Kind, Side, Space, screen, served
from narrows.search.serve import as_json, plan_serve
from narrows.simulate.asked import saturation
from narrows.simulate.fleet import Group, rules, serve
from narrows.simulate.serving import Request
from narrows.simulate.workload import Lengths, generate

GRAPH, L4, H100 = capture("smollm2-135m"), machine("l4"), machine("h100-sxm")
LOAD = tuple(generate(60.0, 300, Lengths(300, 60, 0.5, 0.5), seed=2))
JOB = Job(GRAPH, (Kind(L4, 4),), LOAD, ttft=0.2, tpot=0.01)
SMALL = Space(tensor=(1,), precision=("own",), cache=("own",), max_sequences=(8, 64), max_tokens=(256, 2048), apart=(False,))


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
    plan = plan_serve(JOB, replace(EVERY, tensor=(1, 2)))
    assert plan.evaluated > 100
    for choice in plan.best:
        again = serve(JOB.requests, *choice.config.groups(JOB), ttft=JOB.ttft, tpot=JOB.tpot)
        assert choice.outcome is not None and again.as_json() == choice.outcome.as_json()
        assert choice.attained == again.good / len(LOAD) and choice.keeps == (choice.attained >= JOB.share)
        low, high = choice.interval["tpot_s"]
        assert low < choice.tpot["mean"] < high
    costs = [c.config.dollars_per_hour for c in plan.best if c.keeps]
    assert costs[:-1] == sorted(costs[:-1])  # type: ignore[type-var]  # the last may be the best in the model's own formats
    assert any(choice.config.exact for choice in plan.best)


@pytest.mark.parametrize("apart", [False, True])
def test_screening_saturates_where_the_simulation_does(apart: bool) -> None:
    job = Job(capture("llama-3.1-8b"), (Kind(H100, 8),), tuple(generate(50.0, 200, Lengths(800, 200), seed=1)), 5.0, 0.1)
    space = Space((1, 4), ("own",), ("own",), (32, 128), (2048, 8192), (apart,))
    points = screen(job, space).points
    assert len(points) >= 8
    for point in points[:: max(len(points) // 6, 1)]:
        assert point.full == pytest.approx(saturation(job.requests, *point.config.groups(job)), rel=0.25), str(point.config)


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
    assert {p.config.precision for p in found.points} == {"own", "int8"}


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


def test_int8_weights_ask_for_a_checkpoint() -> None:
    for name, engine in (("vllm", "vllm-v1"), ("sglang", "sglang")):
        assert "W8A16" in emit_server(name, replace(TOGETHER, engine=engine, precision="int8"), "m").splitlines()[0]


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("vllm", {"engine": "sglang"}, "engine"),
        ("sglang", {}, "engine"),
        ("vllm", {"precision": "int4"}, "weights"),
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
    for words, says in ((("-m", "nothing:3"), "no machine"), (("-m", "l4:0"), "at least 1")):
        with pytest.raises(NarrowsError, match=says):
            run(*words, "--rate", "1")


def test_the_context_of_a_model_is_known_from_its_config(tmp_path: Any) -> None:
    assert longest("llama-3.1-8b") == 131072 and longest("no-such-model") == 0 and longest(tmp_path) == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"max_position_embeddings": 77}}))
    assert longest(tmp_path) == 77 == longest(tmp_path / "config.json")
    words = ["simulate", "serve", "smollm2-135m", "-m", "l4", "--rate", "5", "--requests", "20", "-p", "99", "--spread", "0"]
    found = json.loads(CliRunner().invoke(cli, [*words, "-o", "9", "--context", "100", "--json"]).stdout)
    assert (found["requests"], found["rejected"]) == (0, 20)


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
