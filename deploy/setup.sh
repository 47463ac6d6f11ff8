# Sourced by up, test and check, in POSIX sh: makes .venv and installs what requirements.lock names into it.
# A second call finds its stamp and does nothing. Everything it makes is under .venv; clones share only pip's cache.

set -eu
cd -- "$(dirname -- "$0")"
SETUP_LOG=.venv/setup.log
# Beside the lock, so that pip takes the build (CPU, CUDA, ROCm) that this machine's own configuration offers.
TORCH=torch==2.13.0

setup_fail() {
    printf '%s\n' "$@" >&2
    exit 3
}

# Prints the interpreter to use: $PYTHON, or the first of Python 3.11 to 3.13 that PATH has.
setup_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    setup_fail "Overpaint needs Python 3.11, 3.12 or 3.13, and PATH has none of them." \
        "On Debian 12, Ubuntu 24.04 and later: apt-get install python3 python3-venv" \
        "One that is elsewhere: PYTHON=/path/to/python3.12 $0"
}

# What the installation depends on, as one line. The same with .venv activated, so the interpreter's base counts.
setup_wanted() {
    {
        pwd
        echo "$TORCH"
        "$1" -c 'import sys; print(sys.version, sys.base_prefix)'
        cat requirements.lock pyproject.toml deploy/setup.sh
    } | sha256sum | cut -d ' ' -f 1
}

# One line on the screen for each step, the rest in the log.
setup_step() {
    what=$1
    shift
    printf '  %s ... ' "$what"
    started=$(date +%s)
    if ! "$@" >>"$SETUP_LOG" 2>&1 </dev/null; then
        echo failed
        grep -v -e '^WARNING' -e '^Looking in' "$SETUP_LOG" | tail -n 15 >&2
        setup_fail "The whole log: $SETUP_LOG. A network fault? Run $0 again; it goes on where it stopped."
    fi
    echo "$(($(date +%s) - started)) s"
}

setup_install() {
    pip=".venv/bin/python -m pip --disable-pip-version-check install --progress-bar off"
    setup_step "installing $TORCH" $pip "$TORCH"
    # --no-deps: the lock is complete, and pip would look for torch in it.
    setup_step "installing what requirements.lock names (some minutes)" $pip --no-deps --require-hashes -r requirements.lock
    setup_step "installing Overpaint" $pip --no-deps --no-build-isolation --editable .
}

setup() {
    python=$(setup_python)
    wanted=$(setup_wanted "$python")
    if [ "$(cat .venv/stamp 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
        return
    fi
    echo "Setting up (log: $SETUP_LOG)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || setup_fail "This Python cannot make virtual environments." \
        "On Debian and Ubuntu: apt-get install python3-venv" \
        "(or the one of its version: $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
    mkdir -p .venv
    : >"$SETUP_LOG"
    setup_step "making .venv with $("$python" --version)" "$python" -m venv .venv
    setup_install
    echo "$wanted" >.venv/stamp
}

setup
