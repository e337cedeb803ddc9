#!/usr/bin/env bash
# Everything that needs a GPU, in one go of a few minutes: the kernels' tests, then benchmarks, the most telling ones first.
#
#     scripts/bench/gpu.sh results/h200                       # rows go to results/h200/*.jsonl
#     BUDGET=1500 scripts/bench/gpu.sh results/h200           # seconds in all (540); what does not fit is left out
#     SCHEMES="nuq4-1% rdnuq3.4" PARTS=bench scripts/bench/gpu.sh results/h200
#     PARTS=smollm2 MODEL=./smollm2 QUANTIZERS="nuq4.st nuq3.st" TEXT=notes.txt scripts/bench/gpu.sh results/h200
#     DRY=1 scripts/bench/gpu.sh results/dry                  # the same steps on a CPU, tiny
#
#     PARTS     tests bench                  any of these, in this order:
#               tests       the kernels' tests
#               sanitize    every kernel on small shapes, watched by compute-sanitizer: memcheck, racecheck
#               smollm2     a real MODEL and its QUANTIZERS against the CPU, on a TEXT (pydoc)
#               bench       attention of one layer against fp16
#               generate    whole models: decode and prefill from several CACHES at CONTEXTS
#     SHAPES    llama-7b llama-3-8b
#     SCHEMES   nuq4-1% nuq3-1% nuq2-1%      each against fp16, in the same process
#     CACHES    fp16 nuq4-1% ...             those of scripts/bench/generate.py
#     CONTEXTS  32K 128K 512K 1M             of generate
#     PYTHON    python3, which has the requirements; nothing is installed
#
# Each part has a limit of its own, and rows are written as they are measured, so nothing is lost when time is up. Exits with 1
# if a test, a check or a benchmark failed.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/lease.sh"
explain "$@"
begin_lease "$1"

parts=${PARTS:-tests bench}
read -ra shapes <<<"${SHAPES:-llama-7b llama-3-8b}"
read -ra schemes <<<"${SCHEMES:-nuq4-1% nuq3-1% nuq2-1%}"
read -ra caches <<<"${CACHES:-fp16 nuq4-1% nuq3-1% nuq2-1% nuq2 fp16-dynamic fp16-static hqq4 quanto4}"
read -ra contexts <<<"${CONTEXTS:-32K 128K 512K 1M}"
read -ra quantizers <<<"${QUANTIZERS:-}"
device=cuda tests=(tests/test_kernels_*.py tests/test_deployment_graphed.py) many=8
short=(2K 16K 128K) long=(512K 1M)
models=("${shapes[@]}") steps=() check=() whole=()
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [[ -n ${DRY:-} ]]; then
    device=cpu tests=(tests/test_kernels_schedule.py) many=2 models=(tiny) contexts=(128)
    short=(64 128) long=(192)
    steps=(--schemes nuq2 --context 64 --chunk 20)
    check=(--windows 2 --seqlen 64 --prompts 1 --prompt-tokens 16 --new-tokens 4 --prefill-chunk 32 --limit 1)
    whole=(--chunks 16 --prefill-context 64)
fi
results=$out/benchmark.jsonl

# benchmark NAME LIMIT BATCH OPS CONTEXT...: every shape and scheme
benchmark() {
    local name=$1 limit=$2 batch=$3 ops=$4 scheme shape
    shift 4
    for shape in "${shapes[@]}"; do
        for scheme in "${schemes[@]}"; do
            run "$name-$(basename "$shape")-$scheme" "$limit" "$python" -m deployment.benchmark --device "$device" \
                --shape "$shape" --scheme "$scheme" --batch "$batch" --ops "$ops" --contexts "$@" --results "$results"
        done
    done
}

table() {
    "$python" - "$results" <<'PYTHON'
import sys

from gradients.cli import format_table
from quant.results import read_rows

lines = []
for row in read_rows(sys.argv[1]):
    line = {name: row[name] for name in ("shape", "batch", "context", "scheme", "path", "copy_gb_per_s")}
    timed = {op["op"]: op for op in row["ops"]}
    for op in ("decode", "append", "prefill"):
        times = timed.get(op)
        line[op] = f"{times['us']:.0f}" if times else ""
        line[f"{op} fp16"] = f"{times['fp16_us']:.0f}" if times else ""
    decode = timed.get("decode", {"speedup": 0, "percent_of_copy": 0, "fp16_way": ""})
    lines.append({**line, "fp16 by": decode.get("fp16_way", ""), "speed-up": f"{decode['speedup']:.2f}", "% of copy": f"{decode['percent_of_copy']:.0f}"})
print(format_table(lines) if lines else "no rows")
PYTHON
}

nvidia-smi >"$out/device.txt" 2>&1 || echo "no nvidia-smi" >"$out/device.txt"
if [[ $parts == *tests* ]]; then
    run tests 240 "$python" -m pytest -q -x -p no:cacheprovider "${tests[@]}"
fi
if [[ $parts == *sanitize* ]]; then
    if [[ -n ${DRY:-} ]]; then
        TRITON_INTERPRET=1 run sanitize-none 120 "$python" -m scripts.checks.small_steps --device "$device" "${steps[@]}"
    elif [[ -x $sanitizer ]]; then
        # by itself first, so that kernels are compiled before they are watched
        run sanitize-none 60 "$python" -m scripts.checks.small_steps --device "$device"
        for tool in memcheck racecheck; do
            # a tensor is an allocation of its own, so that memcheck sees where it ends
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize-$tool" 150 "$sanitizer" --tool "$tool" --error-exitcode 9 \
                "$python" -m scripts.checks.small_steps --device "$device"
        done
    else
        echo "left out   sanitize: no compute-sanitizer"
    fi
fi
if [[ $parts == *smollm2* ]]; then
    if [[ -n ${MODEL:-} && ${#quantizers[@]} -gt 0 ]]; then
        for file in "${quantizers[@]}"; do
            run "smollm2-$(basename "$file")" 200 "$python" -m scripts.checks.device "$MODEL" "$file" --device "$device" \
                --text "${TEXT:-pydoc}" "${check[@]}" --results "$out/device.jsonl"
        done
    else
        echo "left out   smollm2: no MODEL, or no QUANTIZERS"
    fi
fi
if [[ $parts == *bench* ]]; then
    benchmark short 60 1 decode,append,prefill "${short[@]}"
    benchmark batch 60 "$many" decode,append "${short[@]}"
    benchmark long 90 1 decode "${long[@]}"
    table
fi
if [[ $parts == *generate* ]]; then
    left=$((deadline - SECONDS))
    share=$((left / ${#models[@]}))
    for shape in "${models[@]}"; do
        # a cell that has begun may take a while
        run "generate-$(basename "$shape")" "$share" "$python" -m scripts.bench.generate --device "$device" \
            --shape "$shape" --caches "${caches[@]}" --contexts "${contexts[@]}" "${whole[@]}" \
            --seconds "$((share > 120 ? share - 60 : share / 2))" --results "$out/generate.jsonl"
        { grep -v '^{' "$out/generate-$(basename "$shape").txt" || true; } 2>/dev/null
    done
fi
exit "$failed"
