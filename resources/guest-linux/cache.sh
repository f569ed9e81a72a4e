# shellcheck shell=bash
# Sourced by the build scripts of this guest. What it shares with the other guests'
# is a file of its own, and this one stays: build-kernel is an input of the kernel,
# and a change of the line that sources this would have everybody build it anew.
guest_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # for the file below
package_set=guest
# shellcheck source=../cache.sh
source "$guest_dir/../cache.sh"
