#!/bin/sh
# Instructions and allocations of one decision, counted by valgrind (Debian: valgrind): a run of many decisions less a run
# of few, so that what comes before them does not count.
set -eu
cd "$(dirname "$0")/../../.."
binary=$(cargo bench -p isochrone-core --bench instructions --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*instructions[^"]*\)".*/\1/p' | tail -1)

count() { # tool-and-options, pattern, endpoints, regions, decisions
    # shellcheck disable=SC2086
    valgrind $1 "$binary" "$3" "$4" "$5" 2>&1 | sed -n "s/$2/\1/p" | tr -d ,
}
instructions() { count "--tool=callgrind --callgrind-out-file=/dev/null" '.*Collected : \([0-9]*\).*' "$@"; }
allocations() { count "--tool=memcheck --undef-value-errors=no" '.*total heap usage: \([0-9,]*\) allocs.*' "$@"; }

echo "endpoints  regions  instructions  allocations"
for size in '3 3' '30 10' '30 30' '300 30' '300 100'; do
    # shellcheck disable=SC2086
    more=$(instructions $size 11000) fewer=$(instructions $size 1000)
    # shellcheck disable=SC2086
    allocated=$(($(allocations $size 2000) - $(allocations $size 1000)))
    echo "$size $(((more - fewer) / 10000)) $((allocated))" | awk '{ printf "%9d  %7d  %12d  %11d\n", $1, $2, $3, $4 }'
done
