#!/usr/bin/env bash
# The main job on a real model: capture, diagnose on this machine, prescribe, apply within a budget, verify, report.
set -euo pipefail
narrows=${1:-narrows}
out=${2:-build/demo}
rm -rf "$out" && mkdir -p "$out"
export NARROWS_HOME=${NARROWS_HOME:-.cache/narrows} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m$ narrows %s\033[0m\n' "$*"; "$narrows" "$@"; }

say diagnose smollm2-135m --dtype fp32 --machine here --decode --context 128 --eager --html "$out/diagnosis.html"
say prescribe smollm2-135m --dtype fp32 --machine here --decode --context 128 --eager

# a budget asks for a format of every layer; PLAN names a plan instead
how=(--budget "${BUDGET:-size<=60%, decode>=1.3x, perplexity<=+3%}")
[ -z "${PLAN:-}" ] || how=(--plan "$PLAN")
say apply smollm2-135m "${how[@]}" --out "$out/model"
say verify smollm2-135m "$out/model" --machine here --max-perplexity 1.03 --html "$out/report.html" --results "$out/results.csv"
echo
echo "The report with roofline, waterline and ledger: $out/report.html"
