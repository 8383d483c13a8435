#!/usr/bin/env bash
# Installs a build into a scratch folder and uses it from there: with find_package and with pkg-config, from
# C and from C++.
#
#   run.sh <build folder>      CMAKE, CC and CXX choose the tools
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
cmake=${CMAKE:-cmake}
cc=${CC:-cc}
cxx=${CXX:-}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
"$cmake" --install "$build" --prefix "$prefix"
version=$(sed -n 's/^#define PK_VERSION "\(.*\)"$/\1/p' "$prefix/include/pathkernel.h")
flags=$(sed -n 's/^CMAKE_C_FLAGS:STRING=//p' "$build/CMakeCache.txt")
read -ra flag_array <<<"$flags"

languages=(C)
if [ -n "$cxx" ]; then
    languages+=(CXX)
else
    echo 'left out: C++, no compiler for it'
fi

for language in "${languages[@]}"; do
    echo "== find_package from $language"
    "$cmake" -S "$here" -B "$work/$language" -DLANGUAGE="$language" -DEXPECTED_VERSION="$version" \
        -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" \
        -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" --no-warn-unused-cli
    "$cmake" --build "$work/$language"
    (cd "$work/$language" && ctest --output-on-failure)
done
# A package that is too old must not be taken.
if "$cmake" -S "$here" -B "$work/newer" -DLANGUAGE=C -DEXPECTED_VERSION=1000.0 -DCMAKE_PREFIX_PATH="$prefix" \
    -DCMAKE_C_COMPILER="$cc" >/dev/null 2>&1; then
    echo "find_package(pathkernel 1000.0) was content with $version"
    exit 1
fi

if command -v pkg-config >/dev/null; then
    export PKG_CONFIG_PATH=$prefix/share/pkgconfig
    [ "$(pkg-config --modversion pathkernel)" = "$version" ]
    read -ra cflags <<<"$(pkg-config --cflags pathkernel)"
    read -ra libs <<<"$(pkg-config --libs pathkernel)"
    echo "== pkg-config: ${cflags[*]} ... ${libs[*]}"
    "$cc" "${flag_array[@]}" "${cflags[@]}" "$here/main.c" "$here/implementation.c" -o "$work/c" "${libs[@]}"
    "$work/c"
    if [ -n "$cxx" ]; then
        "$cc" "${flag_array[@]}" "${cflags[@]}" -c "$here/implementation.c" -o "$work/implementation.o"
        "$cxx" "${flag_array[@]}" -x c++ "${cflags[@]}" "$here/main.c" -o "$work/cxx" -x none \
            "$work/implementation.o" "${libs[@]}"
        "$work/cxx"
    fi
else
    echo 'left out: pkg-config is not installed'
fi

for program in "$prefix/bin/pathkernel" "$prefix/bin/pathkernel-decompose"; do
    code=0
    "$program" >"$work/usage" 2>&1 || code=$?
    if [ "$code" -ne 2 ]; then
        echo "$program without arguments: exit status $code, not 2"
        exit 1
    fi
done
# Both names are one program.
"$prefix/bin/pathkernel" decompose --help | sed 1d >"$work/help"
"$prefix/bin/pathkernel-decompose" --help | sed 1d | cmp - "$work/help"
