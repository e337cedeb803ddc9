# A virtual environment with this repository in it; sourced by the other scripts, under `set -euo pipefail`.
#
#     source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
#     prepare_environment test        # an extra of pyproject.toml; sets $python
#
# The environment is VENV, or .venv beside this folder. It is made if it is not there, and left alone while
# neither pyproject.toml nor constraints.txt changes.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=

prepare_environment() {
    local extra=$1 venv=${VENV:-$repository/.venv}
    case $venv in
        /*) ;;
        *) venv=$PWD/$venv ;;
    esac
    python=$venv/bin/python
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        create_environment "$venv"
    elif ! is_new_enough "$python"; then
        stop "$venv holds $("$python" --version 2>&1), but 3.11 or newer is needed: delete it, or set VENV"
    fi
    install_repository "$venv" "$extra"
}

create_environment() {
    local venv=$1 system_python
    if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        stop "$venv is there but is no virtual environment: delete it, or set VENV to another folder"
    fi
    system_python=$(find_python) || stop "no Python 3.11 or newer was found; install one and run this again"
    echo "making a virtual environment with $("$system_python" --version) in $venv" >&2
    "$system_python" -m venv "$venv" ||
        stop "cannot make $venv: delete it if it is there and try again; Debian and Ubuntu need python3-venv installed"
}

find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        # a launcher of that name may be there and lead nowhere, so it has to run
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

install_repository() {
    local venv=$1 extra=$2 stamp wanted
    stamp=$venv/installed-$extra
    # the repository's place is part of it: an editable install points there
    wanted=$(cd "$repository" && { pwd; cat pyproject.toml constraints.txt; } | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "installing into $venv (once; PyTorch alone is some hundred megabytes)" >&2
    (cd "$repository" && "$python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extra]")
    echo "$wanted" >"$stamp"
}

stop() {
    echo "error: $1" >&2
    exit 2
}
