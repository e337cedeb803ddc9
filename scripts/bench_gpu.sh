#!/usr/bin/env bash
# Everything that needs a GPU, in one go of a few minutes: the kernels' tests, then benchmarks, the most telling ones first.
#
#     scripts/bench_gpu.sh results/h200                       # rows go to results/h200/benchmark.jsonl
#     BUDGET=1500 scripts/bench_gpu.sh results/h200           # seconds in all (540); what does not fit is left out
#     SCHEMES="nuq4-1% rdnuq3.4" PARTS=bench scripts/bench_gpu.sh results/h200
#     DRY=1 scripts/bench_gpu.sh /tmp/dry                     # the same steps on a CPU, tiny
#
#     SHAPES    llama-7b llama-3-8b
#     SCHEMES   nuq4-1% nuq3-1% nuq2-1%      each against fp16, in the same process
#     PARTS     tests bench                  either or both
#     PYTHON    python3, which has the requirements; nothing is installed
#
# Each part has a limit of its own, and rows are written as they are measured, so nothing is lost when time is up. Exits with 1
# if a test or a benchmark failed.
set -euo pipefail

usage() {
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit "${1:-0}"
}

[[ ${1:-} == -h || ${1:-} == --help ]] && usage
[[ $# -eq 1 ]] || usage 2 >&2
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

python=${PYTHON:-python3}
deadline=$((SECONDS + ${BUDGET:-540}))
parts=${PARTS:-tests bench}
read -ra shapes <<<"${SHAPES:-llama-7b llama-3-8b}"
read -ra schemes <<<"${SCHEMES:-nuq4-1% nuq3-1% nuq2-1%}"
device=cuda tests=(tests/test_kernels_*.py) many=8
short=(2K 16K 128K) long=(512K 1M)
if [[ -n ${DRY:-} ]]; then
    device=cpu tests=(tests/test_kernels_lookup.py) many=2
    short=(64 128) long=(192)
fi
results=$out/benchmark.jsonl
failed=0

# run NAME LIMIT COMMAND...: at most so many seconds, and no more than are left; its output goes to NAME.txt
run() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS code=0
    shift 2
    if ((left < 15)); then
        echo "left out   $name: no time left"
        return
    fi
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$out/$name.txt" 2>&1 || code=$?
    case $code in
        0) echo "done       $name ($((SECONDS - began)) s)" ;;
        124 | 137) echo "cut short  $name ($((SECONDS - began)) s)" ;;
        *)
            echo "failed     $name ($((SECONDS - began)) s): $(tail -n 1 "$out/$name.txt")"
            failed=1
            ;;
    esac
}

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
    decode = timed.get("decode", {"speedup": 0, "percent_of_copy": 0})
    lines.append({**line, "speed-up": f"{decode['speedup']:.2f}", "% of copy": f"{decode['percent_of_copy']:.0f}"})
print(format_table(lines) if lines else "no rows")
PYTHON
}

nvidia-smi >"$out/device.txt" 2>&1 || echo "no nvidia-smi" >"$out/device.txt"
if [[ $parts == *tests* ]]; then
    run tests 240 "$python" -m pytest -q -x -p no:cacheprovider "${tests[@]}"
fi
if [[ $parts == *bench* ]]; then
    benchmark short 60 1 decode,append,prefill "${short[@]}"
    benchmark batch 60 "$many" decode,append "${short[@]}"
    benchmark long 90 1 decode "${long[@]}"
    table
fi
exit "$failed"
