# shellcheck shell=bash
# Sourced by the build scripts of this guest.
guest_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # for the file below
package_set=rootfs
# shellcheck source=../cache.sh
source "$guest_dir/../cache.sh"

# Debian's tools make a tree that belongs to root. Asked for before the work begins,
# because a job in the background cannot ask for a password.
need_root() {
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null || fail "needs root (or sudo): a root file system belongs to root"
    sudo --validate || fail "needs root: a root file system belongs to root"
}

# Runs a script of this directory as root, apart from the machine: its mounts go with
# it however it ends, and so do all processes that it started. $work/tree is a tmpfs
# there, where the thousands of fsync of dpkg cost nothing.
run_apart() {
    local script=$1
    shift
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo --non-interactive)
    mkdir "$work/tree"
    "${sudo[@]}" unshare --mount --propagation private --pid --fork --kill-child \
        bash -c 'mount -t tmpfs -o mode=755,size=1g samepage-tree "$1" && shift && exec "$@"' \
        apart "$work/tree" "$guest_dir/$script" "$work/tree" "$@" 9>&-
}
