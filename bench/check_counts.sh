#!/bin/sh
# bench/check_counts.sh: do fixed small jobs (bench/count_jobs.c) take as many instructions, flops and bytes as they did?
#
#   bench/check_counts.sh [--update] [JOB ...]
#
# valgrind counts instructions, so neither the load nor the clock of a machine matters. Nor shall its processor: no BLIS,
# no threads, no choice of kernels at run time, and the C library is told to use what every x86-64 has. What is left is the
# toolchain; bench/counts.csv holds the figures of one or more, and elsewhere the counts are printed and not judged.
# A figure more than 5 % above its own fails; the command that shows where is printed. Below by as much: --update, which
# writes the figures of this toolchain anew, and commit them.
#
# CC: the compiler; COUNTS_FOLDER: where the program and the profiles go (build/counts). Exit status 77: no valgrind.
set -eu
cd "$(dirname "$0")/.."
figures=bench/counts.csv
folder=${COUNTS_FOLDER:-build/counts}
cc=${CC:-gcc}
update=0
if [ "${1:-}" = --update ]; then
    update=1
    shift
fi
if ! command -v valgrind >/dev/null; then
    echo 'LEFT OUT: no valgrind here (Debian: apt-get install valgrind)'
    exit 77
fi

# Whose figures they are: processor, compiler, C library.
if "$cc" -dM -E -x c /dev/null | grep -q __clang__; then name=clang; else name=gcc; fi
version=$("$cc" -dumpversion)
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo unknown)
toolchain="$(uname -m) $name-${version%%.*} $(echo "$libc" | tr ' ' '-')"

mkdir -p "$folder"
"$cc" -std=gnu11 -O2 -g -DPATHKERNEL_NO_DISPATCH -Iinclude bench/count_jobs.c -lm -o "$folder/count_jobs"
# shellcheck disable=SC2046 # names without spaces
[ $# -gt 0 ] || set -- $("$folder/count_jobs")

GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-FMA,-FMA4,-ERMS,-FSRM,-SSSE3,-SSE4_1,-SSE4_2
GLIBC_TUNABLES=$GLIBC_TUNABLES:glibc.cpu.x86_data_cache_size=32768:glibc.cpu.x86_shared_cache_size=1048576
GLIBC_TUNABLES=$GLIBC_TUNABLES:glibc.cpu.x86_non_temporal_threshold=1048576
counted=$folder/counted.csv
: >"$counted"
for job in "$@"; do
    profile=$folder/callgrind.$job
    if ! GLIBC_TUNABLES=$GLIBC_TUNABLES valgrind --tool=callgrind --toggle-collect=counted \
        --callgrind-out-file="$profile" "$folder/count_jobs" "$job" >"$folder/$job.out" 2>"$folder/$job.err"; then
        cat "$folder/$job.out" "$folder/$job.err"
        exit 1
    fi
    read -r _ flops bytes <"$folder/$job.out"
    instructions=$(awk '/^totals:/ { print $2 }' "$profile")
    for figure in "instructions,$instructions" "flops,$flops" "bytes,$bytes"; do
        [ "${figure#*,}" = 0 ] || echo "$toolchain,$job,$figure" >>"$counted"
    done
done

if [ $update -eq 1 ]; then
    {
        echo 'toolchain,job,what,count'
        if [ -e "$figures" ]; then
            awk -F, 'FNR == NR { new[$1, $2, $3]; next } FNR > 1 && !(($1, $2, $3) in new)' "$counted" "$figures"
        fi
        cat "$counted"
    } >"$figures.new"
    mv "$figures.new" "$figures"
    echo "$figures now has the figures of $toolchain: $*"
    exit 0
fi

# shellcheck disable=SC2016 # awk's own variables
awk -F, -v toolchain="$toolchain" -v folder="$folder" -v figures="$figures" -v tolerance=0.05 '
    FNR == NR { if ($1 == toolchain) { known = 1; figure[$2, $3] = $4 } else if (FNR > 1) others[$1]; next }
    FNR == 1 { printf "%s\n%-20s %-13s %14s %14s %7s\n", toolchain, "job", "what", "counted", "checked in", "ratio" }
    {
        before = figure[$2, $3]
        ratio = before ? $4 / before : 0
        verdict = ""
        if (!before) {
            verdict = known ? "no figure" : ""
            missing += known
        } else if (ratio > 1 + tolerance) {
            verdict = "ABOVE"
            above[$2]
            failed = 1
        } else if (ratio < 1 - tolerance) {
            verdict = "below"
            below = 1
        }
        printf "%-20s %-13s %14d %14s %7s %s\n", $2, $3, $4, before, before ? sprintf("%.3f", ratio) : "", verdict
    }
    END {
        for (job in above) {
            printf "\n%s takes more than it did. Where:\n  callgrind_annotate --auto=yes %s/callgrind.%s\n", job, folder, job
            printf "Where it was, the same in a checkout of an earlier commit; on purpose: bench/check_counts.sh --update\n"
        }
        if (below || missing)
            print "\nBetter than the figures, or without: write them anew with\n  bench/check_counts.sh --update"
        if (!known) {
            printf "\nNot judged: %s has no figures of this toolchain, only of:\n", figures
            for (name in others)
                print "  " name
        }
        exit failed || missing
    }' "$figures" "$counted"
