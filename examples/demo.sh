#!/usr/bin/env bash
# The main job on a real model: capture, diagnose on this machine, prescribe, apply, verify, report.
set -euo pipefail
narrows=${1:-narrows}
out=${2:-build/demo}
rm -rf "$out" && mkdir -p "$out"
export NARROWS_HOME=${NARROWS_HOME:-.cache/narrows} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m$ narrows %s\033[0m\n' "$*"; "$narrows" "$@"; }

say diagnose smollm2-135m --dtype fp32 --machine here --decode --context 128 --eager --html "$out/diagnosis.html"

# the fastest plan among those that were measured to keep quality here; compiling takes minutes, so a demo leaves it out
prescribe=(prescribe smollm2-135m --dtype fp32 --machine here --decode --context 128 --eager --within 1.15)
say "${prescribe[@]}"
plan=${PLAN:-$("$narrows" "${prescribe[@]}" --json | "$(dirname "$narrows")/python" -c '
import json, sys
options = json.load(sys.stdin)["options"]
print(next(o["plan"] for o in options).replace(" + compile", ""))')}

say apply smollm2-135m --plan "$plan" --out "$out/model"
say verify smollm2-135m "$out/model" --machine here --max-perplexity 1.15 --html "$out/report.html" --results "$out/results.csv"
echo
echo "The report with roofline, waterline and ledger: $out/report.html"
