# Sourced by ./hetis and ./test: makes the environment in .venv and keeps it up to date.
# Needs a Python of 3.11 to 3.14 with venv and pip; PYTHON=... names one. Prints to stderr only.

supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported_python "$PYTHON" && echo "$PYTHON" && return
        echo "PYTHON=$PYTHON is not a working Python of 3.11 to 3.14" >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        supported_python "$candidate" && echo "$candidate" && return
    done
    echo "no Python of 3.11 to 3.14 found: install one, or name it with PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    if .venv/bin/python -c '' 2>/dev/null; then
        echo ".venv holds $(.venv/bin/python --version), 3.11 to 3.14 is needed: remove .venv first" >&2
        return 1
    fi
    python=$(find_python) || return 1
    echo "making .venv with $("$python" --version) ..." >&2
    "$python" -m venv --clear .venv >&2
}

# ensure_env EXTRA: the package, editable, with the optional dependencies EXTRA ('' for none).
# What was installed is stamped with a checksum of its inputs, the place included: a moved
# checkout would leave the editable install pointing at the old place.
ensure_env() {
    extra=$1
    inputs=$({ pwd; cat pyproject.toml constraints.txt; } | cksum)
    stamp=".venv/.installed-${extra:-run}"
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
        return 0
    fi
    supported_python .venv/bin/python || make_venv || return 1
    echo "installing ${extra:-run-time} dependencies into .venv ..." >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extra:+[$extra]}" >&2 || return 1
    # Every extra brings the run-time dependencies with it.
    echo "$inputs" | tee .venv/.installed-run >"$stamp"
}
