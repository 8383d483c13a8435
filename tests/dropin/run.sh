#!/usr/bin/env bash
# pathkernel.h dropped into an empty folder: one file, two files, static copies, used from C++, strict and not,
# compiled with nothing but a compiler. CC and CXX choose compilers.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cc=${CC:-cc}
cxx=${CXX:-}
warnings=(-Wall -Wextra -Wpedantic -Wshadow -Werror)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cp "$root/pathkernel.h" "$here"/*.c "$here"/use.h .

# What the compiler at hand cannot do is left out, with the reason.
openmp=()
echo 'int main(void) { return 0; }' >probe.c
if "$cc" -fopenmp probe.c -o probe 2>/dev/null; then
    openmp=(-fopenmp)
else
    echo "left out: -fopenmp, $cc has no OpenMP runtime here"
fi

check() { # name, then the command that makes ./program
    local name=$1
    shift
    echo "$name: $*"
    "$@"
    ./program
    rm -f program
}

mkdir -p examples
cp "$root/examples/01_quickstart.c" examples/
cp -r "$root/examples/data" examples/
echo "quickstart: $cc -O3 ${openmp[*]} -I. examples/01_quickstart.c -lm"
"$cc" -O3 "${openmp[@]}" -I. examples/01_quickstart.c -lm
./a.out

check 'two files' "$cc" -O0 "${openmp[@]}" "${warnings[@]}" main.c implementation.c -o program -lm
# As distributions build: glibc's checks need the optimizer in functions that are not worth optimizing, too.
check 'two files, one thread, fortified' "$cc" -O2 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 "${warnings[@]}" main.c \
    implementation.c -o program -lm
check 'static, strict C11' "$cc" -std=c11 -O0 "${warnings[@]}" static_main.c static_other.c -o program -lm
if [ -n "$cxx" ]; then
    if "$cxx" -std=c++17 -x c++ -O0 -fsyntax-only static_main.c 2>refused.txt; then
        echo 'the implementation compiles as C++, which nobody tests'
        exit 1
    fi
    grep -m 1 "implementation is C11" refused.txt
    "$cc" -O0 "${warnings[@]}" -c implementation.c -o implementation.o
    "$cxx" -std=c++17 -x c++ -O0 "${warnings[@]}" -c main.c -o main.o
    check 'used from C++, compiled as C' "$cxx" main.o implementation.o -o program -lm
else
    echo 'left out: C++, no compiler for it'
fi

# Declarations alone must not bring the headers of the implementation with them.
echo '#include "pathkernel.h"' >declarations.c
if "$cc" -DPATHKERNEL_BLIS "${openmp[@]}" -M declarations.c | grep -E '/(stdio|stdlib|math|omp|blis|pthread)\.h'; then
    echo 'the declarations include more than they need'
    exit 1
fi
