# What scripts for one lease of a machine share: a budget of seconds, and steps that end when it does.
#
#     source "$(dirname "${BASH_SOURCE[0]}")/lease.sh"
#     explain "$@"                 # prints the script's first comment for -h, and unless there is exactly one argument
#     begin_lease FOLDER           # sets $out, $python, $deadline, $failed; goes to the repository
#     run NAME LIMIT COMMAND...    # a step; exit with $failed after the last

explain() {
    local code
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        code=0
    elif (($# != 1)); then
        code=2
    else
        return 0
    fi
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0" >&$((code ? 2 : 1))
    exit "$code"
}

begin_lease() {
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    cd "$(dirname "${BASH_SOURCE[0]}")/../.."
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    python=${PYTHON:-python3}
    deadline=$((SECONDS + ${BUDGET:-540}))
    failed=0
}

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

refuse() {
    echo "error: $1" >&2
    exit 2
}
