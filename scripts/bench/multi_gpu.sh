#!/usr/bin/env bash
# Everything that needs several GPUs, in one go of a few minutes: a model and its packed cache spread over them, the
# longest context that decodes, and calibration and evaluation split over processes.
#
#     scripts/bench/multi_gpu.sh results/8xh200               # rows go to its gpu-multi-*.jsonl, a file for each part
#     BUDGET=1500 scripts/bench/multi_gpu.sh results/8xh200   # seconds in all (540); what does not fit is left out,
#     PARTS=longest scripts/bench/multi_gpu.sh results/8xh200 #   so where a call may take no longer: a part each
#     DRY=1 scripts/bench/multi_gpu.sh results/dry            # the same steps on a CPU, tiny; devices are cpu and disk
#
#     PARTS     sharded parallel longest processes
#     SHAPE     llama-7b                     random weights, drawn where they live
#     SCHEMES   nuq2 nuq3-1%                 of the packed cache
#     MODEL     of the processes; a random one of SHAPE with LAYERS (8) layers and a tokenizer of bytes, if not given
#     TEXT      pydoc
#     GPUS      how many to use of those that are visible (all)
#     MEMORY    79GiB                        the longest context also with no more of each GPU, as A100s of 80 GB have
#     PYTHON    python3, which has the requirements; nothing is installed
#
# sharded: on two GPUs, against one: greedy tokens after a prompt and after 128K tokens, and the longest context; memory
# against the plan. parallel: every layer on two GPUs, and on all of them, against one. longest: on all GPUs, the paper's ten million tokens and the longest. processes: two against one.
# Contexts of 128K tokens and more are filled with synthetic blocks; decoding is real. Exits with 1 if a step failed, or
# tokens differ.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lease.sh"
explain "$@"

parts=${PARTS:-sharded parallel longest processes}
for part in $parts; do
    [[ " sharded parallel longest processes " == *" $part "* ]] || refuse "PARTS $part: there are sharded, parallel, longest and processes"
done
shape=${SHAPE:-llama-7b} memory=${MEMORY:-79GiB}
read -ra schemes <<<"${SCHEMES:-nuq2 nuq3-1%}"
device=cuda tokens=32 timed=66 far=12 prompt=2K long=(128K longest) paper=(10000000 longest) limits=()
jobs=8 layers=${LAYERS:-8} sizes=(--seqlen 2048 --windows 16)
if [[ -n ${DRY:-} ]]; then
    shape=tiny device=cpu tokens=4 timed=4 far=4 prompt=200 long=(256 longest) paper=(1000 longest)
    limits=(--device-memory 6MiB) jobs=1 layers=2 memory=6.5MiB all=(cpu disk) two=(cpu disk) sizes=(--seqlen 96 --windows 3)
else
    gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)}
    [[ $gpus =~ ^[0-9]+$ ]] && ((gpus > 1)) || refuse "GPUS ${gpus:-0}: several are needed; DRY=1 goes without"
    mapfile -t all < <(seq -f 'cuda:%g' 0 $((gpus - 1)))
    two=("${all[@]:0:2}")
fi
begin_lease "$1"

# decode PART NAME LIMIT DEVICES... -- OPTIONS...: every scheme
decode() {
    local part=$1 name=$2 limit=$3 scheme devices=()
    shift 3
    while [[ $1 != -- ]]; do
        devices+=("$1")
        shift
    done
    shift
    for scheme in "${schemes[@]}"; do
        run "$part-$name-$scheme" "$limit" "$python" -m scripts.bench.sharded --part "$part" --shape "$shape" \
            --scheme "$scheme" --attempts 5 --devices "${devices[@]}" "$@" \
            --results "$out/gpu-multi-$part.jsonl"
    done
}

# parallel COUNT CONTEXTS...: so many processes compute every layer together; 1: one device does
parallel() {
    local count=$1 launcher=()
    local options=(--devices "${all[0]}")
    shift
    if ((count > 1)); then
        launcher=(-m torch.distributed.run --standalone --nproc-per-node "$count") options=(--tensor-parallel)
    fi
    run "parallel-$count" 200 "$python" ${launcher[@]+"${launcher[@]}"} -m scripts.bench.sharded --graph "${options[@]}" \
        --part "parallel-$count" --shape "$shape" --scheme "${schemes[@]}" --new-tokens "$timed" --contexts "$@" \
        --results "$out/gpu-tensor-parallel.jsonl"
}

processes() {
    local model=${MODEL:-}
    if [[ -z $model ]]; then
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        model=$work/random-model
        run random-model 120 "$python" -m scripts.bench.random_model --shape "$shape" --layers "$layers" --device "$device" \
            --output "$model"
    fi
    run processes 400 "$python" -m scripts.bench.processes --model "$model" --text "${TEXT:-pydoc}" --processes 2 \
        --device "$device" --jobs "$jobs" "${sizes[@]}" --results "$out/gpu-multi-processes.jsonl"
}

table() {
    "$python" - "$out" <<'PYTHON'
import sys
from pathlib import Path

from gradients.cli import format_table
from quant.results import read_rows
from scripts.bench.sharded import table

folder, wrong = Path(sys.argv[1]), False
for part in ("sharded", "longest"):
    if rows := read_rows(folder / f"gpu-multi-{part}.jsonl"):
        print(table(rows), end="\n\n")
        wrong |= any(row.get("tokens_equal_one_device") is False for row in rows)
shown = ("command", "processes", "identical", "largest_difference", "speedup")
if rows := read_rows(folder / "gpu-multi-processes.jsonl"):
    print(format_table([{name: row.get(name, "") for name in shown} for row in rows]))
sys.exit(wrong)
PYTHON
}

nvidia-smi >"$out/devices.txt" 2>&1 || echo "no nvidia-smi" >"$out/devices.txt"
if [[ " $parts " == *" sharded "* ]]; then
    both=(--against-one --new-tokens "$tokens")
    decode sharded prompt 90 "${two[@]}" -- "${both[@]}" --filled prefill --contexts "$prompt"
    decode sharded long 150 "${two[@]}" -- "${both[@]}" --contexts "${long[@]}" "${limits[@]}"
fi
if [[ " $parts " == *" parallel "* ]]; then
    parallel 1 "${long[0]}"
    parallel 2 "${long[0]}"
    if ((${#all[@]} > 2)); then
        parallel "${#all[@]}" "${long[0]}" "${paper[@]}"
    fi
fi
if [[ " $parts " == *" longest "* ]]; then
    decode longest all 200 "${all[@]}" -- --new-tokens "$far" --contexts "${paper[@]}" "${limits[@]}"
    decode longest limited 150 "${all[@]}" -- --new-tokens "$far" --contexts longest --device-memory "$memory"
fi
if [[ " $parts " == *" processes "* ]]; then
    processes
fi
table || failed=1
exit "$failed"
