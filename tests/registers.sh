#!/usr/bin/env bash
# Usage: registers.sh FILE. That no function of a compiled library returns with the upper halves of the vector
# registers in use (vzeroupper is missing, a gap of gcc 12's): all that is not AVX would then take up to seven times as
# long, until another function clears them.
set -euo pipefail
objdump -d --no-show-raw-insn "$1" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $2; wide = clears = 0 }
    /%[yz]mm/ { wide = 1; functions += !counted[name]++ }
    /vzeroupper/ { clears = 1 }
    /^$/ { if (wide && !clears) { print "vzeroupper is missing in " name; bad = 1 } name = ""; wide = 0 }
    END {
        if (wide && !clears) { print "vzeroupper is missing in " name; bad = 1 }
        print functions + 0 " functions use the upper halves"
        exit bad
    }'
