# shellcheck shell=bash
# Sourced by the cache.sh of each guest: one cache of artifact directories, each
# named by the hash of everything it was made from. A directory is there completely
# or not at all, and one builder works at a time.
#
# The guest's cache.sh sets guest_dir, its own directory, after which the cache is
# named, and package_set, the set of resources/install-packages that its scripts need.

cache_root=${SAMEPAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/samepage}/$(basename "$guest_dir")
program=$(basename "$0")

say() {
    echo "$program: $*" >&2
}

fail() {
    say "$*"
    exit 1
}

# Fails with what to do, not with a "command not found" minutes later.
need_commands() {
    local command
    for command in "$@"; do
        command -v "$command" >/dev/null ||
            fail "$command: not installed (run resources/install-packages $package_set)"
    done
}

# cache_key <first line...> -- <file...>: the name of the artifact directory.
# Files count by content and by base name, so the checkout may be anywhere.
cache_key() {
    local lines=()
    while [ "$1" != -- ]; do
        lines+=("$1")
        shift
    done
    shift
    {
        printf '%s\n' "${lines[@]}"
        local file
        for file in "$@"; do
            printf '%s %s\n' "$(basename "$file")" "$(sha256sum <"$file")"
        done
    } | sha256sum | cut -c1-16
}

# Waits for another builder, then removes what a killed one left. The lock goes
# with this process: a child that may outlive it is started with 9>&-.
lock_cache() {
    mkdir -p "$cache_root"
    exec 9>"$cache_root/lock"
    if ! flock --nonblock 9; then
        say "waiting for another build in $cache_root"
        flock 9
    fi
    # A child of a killed build may still be writing; the next build gets the rest.
    rm -rf "$cache_root"/tmp.* 2>/dev/null || true
}

# Sets $work to a directory in the cache that goes away with this script.
make_work_dir() {
    work=$(mktemp -d "$cache_root/tmp.XXXXXX")
    job=
    trap 'stop_job; rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# Runs a long command so that a signal to this script ends it at once: bash
# answers signals while it waits, not while a foreground command runs. A job of
# its own process group is ended with all its children.
run_job() {
    set -m
    "$@" &
    job=$!
    set +m
    local status=0
    wait "$job" || status=$?
    job=
    return "$status"
}

stop_job() {
    [ -n "$job" ] || return 0
    kill -TERM -- "-$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
}

# publish <made directory> <artifact directory>: the last step, a rename.
publish() {
    chmod 755 "$1"
    # Only a copy that someone damaged by hand is in the way here.
    rm -rf "$2"
    mv "$1" "$2"
}
