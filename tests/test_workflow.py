"""Applying a plan from the command line: the gate, the stream, and what is said of the result."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from narrows import workflow
from narrows.cli.models import apply, verify
from narrows.directory import verify_manifest
from narrows.recover import Recover

WORDS = [f"w{i}" for i in range(96)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder.parent / "text").write_text(" ".join(WORDS[i * i % 95] for i in range(4000)))
    return folder


def run(source: Path, out: Path, *options: str):
    return CliRunner().invoke(apply, [str(source), "--out", str(out), "--text", str(source.parent / "text"), *options])


def weights(folder: Path) -> dict[str, str]:
    return {name: f["sha256"] for name, f in json.loads((folder / "narrows.json").read_text())["files"].items()}


def test_a_failed_gate_leaves_nothing_unless_asked(source, tmp_path):
    refused = run(source, tmp_path / "out", "--plan", "awq:group=64", "--max-perplexity", "0.5")
    assert refused.exit_code == 1 and "above 0.5 times the original" in refused.output
    assert list(tmp_path.iterdir()) == []
    kept = run(source, tmp_path / "out", "--plan", "awq:group=64", "--max-perplexity", "0.5", "--keep")
    assert kept.exit_code == 1 and "refused" in kept.output and verify_manifest(tmp_path / "out") == []
    passed = run(source, tmp_path / "good", "--plan", "awq:group=64", "--max-perplexity", "1.5", "--json")
    assert passed.exit_code == 0 and json.loads(passed.stdout)["quality"]["measure"] == "perplexity"


def test_what_is_too_large_for_memory_is_streamed_to_the_same_files(source, tmp_path, monkeypatch):
    options = ("--plan", "awq:group=64")
    assert run(source, tmp_path / "whole", *options).exit_code == 0
    assert run(source, tmp_path / "streamed", *options, "--stream").exit_code == 0
    monkeypatch.setattr(workflow.os, "sysconf", lambda name: 100)
    assert run(source, tmp_path / "small", *options).exit_code == 0
    assert weights(tmp_path / "streamed") == weights(tmp_path / "whole") == weights(tmp_path / "small")
    refused = run(source, tmp_path / "gated", *options, "--max-perplexity", "1.1")
    assert "a streamed model is not measured" in str(refused.exception) and not (tmp_path / "gated").exists()
    assert run(source, tmp_path / "thinned", "--plan", "llm-drop:attention=1").exit_code == 0  # must see the whole model


def test_it_says_who_reads_the_result_and_what_was_moved(source, tmp_path):
    said = run(source, tmp_path / "alone", "--plan", "awq:group=64 + llm-drop:attention=1")
    assert "read by: narrows alone" in said.output and "llm-drop is applied before awq" in said.output
    said = run(source, tmp_path / "both", "--plan", "int8")
    assert said.exit_code == 0 and "read by" not in said.output and "order:" not in said.output
    said = run(source, tmp_path / "cache", "--plan", "int8 + pyramidkv:budget=17,window=4")
    assert said.exit_code == 0 and "read by others without pyramidkv" in said.output


def test_what_is_changed_or_quantized_already_is_refused_with_what_to_do(source, tmp_path):
    assert run(source, tmp_path / "packed", "--plan", "int8").exit_code == 0
    given = [str(tmp_path / "packed"), "--out", str(tmp_path / "more"), "--plan"]
    for options in ((), ("--stream",)):
        result = CliRunner().invoke(apply, [*given, "bf16", *options])
        assert "Apply 'int8 + bf16' to its original" in str(result.exception)
    (tmp_path / "packed" / "narrows.json").unlink()  # as another program would have written it
    result = CliRunner().invoke(apply, [*given, "awq:group=64"])
    assert "quantized already (compressed-tensors)" in str(result.exception) and not (tmp_path / "more").exists()


def test_a_name_ending_in_gguf_gives_one_file(source, tmp_path):
    refused = run(source, tmp_path / "model.gguf", "--plan", "int8")
    assert "no byte-level BPE" in str(refused.exception) and list(tmp_path.iterdir()) == []
    assert "written from the whole model" in str(run(source, tmp_path / "model.gguf", "--plan", "int8", "--stream").exception)


def test_verify_shows_each_step_alone(source, tmp_path):
    assert run(source, tmp_path / "out", "--plan", "bf16 + int8").exit_code == 0
    options = ["--text", str(source.parent / "text"), "--machine", "a100-80gb", "-p", "8", "-c", "8", "--rounds", "1"]
    result = CliRunner().invoke(verify, [str(source), str(tmp_path / "out"), *options, "--ablation", "--json"])
    found = json.loads(result.stdout)["ablation"]
    assert [one["plan"] for one in found["alone"]] == ["bf16", "int8"]
    assert found["products"]["bytes"]["interaction"] > 1


def test_a_plan_recovers_on_text_that_nothing_is_judged_by_and_leaves_nothing_when_killed(source, tmp_path, monkeypatch):
    plan = ("--plan", "llm-drop:attention=1 + recover:steps=4 + int8")
    assert run(source, tmp_path / "one", *plan).exit_code == run(source, tmp_path / "two", *plan).exit_code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert run(source, tmp_path / "less", "--plan", "llm-drop:attention=1 + int8").exit_code == 0
    assert weights(tmp_path / "one")["model.safetensors"] != weights(tmp_path / "less")["model.safetensors"]
    refused = run(source, tmp_path / "streamed", *plan, "--stream")
    assert "must see the whole model" in str(refused.exception)

    def killed(self: object, model: object, lessons: object, tell: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recover, "recover", killed)
    assert run(source, tmp_path / "killed", *plan).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less", "one", "two"]


@pytest.mark.parametrize("options", [("--keep", "--plan", "int8"), ("--budget", "size<=60%", "--stream"), ()])
def test_options_that_make_no_sense_are_refused(source, tmp_path, options):
    assert run(source, tmp_path / "out", *options).exit_code == 1
    assert list(tmp_path.iterdir()) == []
