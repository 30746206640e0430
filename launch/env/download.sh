#!/usr/bin/env bash
# Make the environment of img2dataset, once: .venv-download in the checkout (or $IMGLISH_DOWNLOAD_ENV), pinned by
# constraints_download.txt, with Pillow, because pictures are decoded there as in training. It lives apart because
# img2dataset needs webdataset < 0.3 and Python < 3.13. Run it, or source it; data_tools.download finds what it made:
#   bash launch/env/download.sh
# Set IMGLISH_DOWNLOAD_PYTHON to use a Python of your own.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

find_download_python() {
    local name
    for name in python3.11 python3.12 python3; do
        if "$name" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "download: img2dataset needs Python 3.11 or 3.12 and none is on the PATH; install one, or set" \
        "IMGLISH_DOWNLOAD_PYTHON" >&2
    return 2
}

make_download_environment() {
    local env=${IMGLISH_DOWNLOAD_ENV:-$root/.venv-download} stamp python
    stamp=$(cat "$root/launch/env/constraints_download.txt" "$root/launch/env/download.sh" | sha256sum)
    [ "$(cat "$env/.imglish-stamp" 2>/dev/null)" = "$stamp" ] && return
    python=$(find_download_python) || return
    echo "download: making the environment of img2dataset in $env (about a minute, once)" >&2
    [ -x "$env/bin/python" ] || "$python" -m venv "$env" || return
    env -u PYTHONPATH "$env/bin/python" -m pip install -q --upgrade pip || return
    env -u PYTHONPATH "$env/bin/python" -m pip install -q -c "$root/launch/env/constraints_download.txt" img2dataset pillow || return
    echo "$stamp" >"$env/.imglish-stamp"
}

if [ -z "${IMGLISH_DOWNLOAD_PYTHON:-}" ]; then
    # The tasks of an array job start together: one makes it, the others wait.
    lock=${IMGLISH_DOWNLOAD_ENV:-$root/.venv-download}.lock
    if command -v flock >/dev/null; then
        (
            flock 9
            make_download_environment
        ) 9>"$lock" || exit
    else
        make_download_environment || exit
    fi
fi
