# A test of amalgamate.cmake on small made modules: the text between markers comes out byte for byte,
# whatever CMake would make of its characters, and every broken module is refused with the reason.
#
#   cmake -D WORK=<scratch folder> -P cmake/amalgamate_test.cmake
cmake_minimum_required(VERSION 3.25)
if(NOT WORK)
    message(FATAL_ERROR "-D WORK=<scratch folder> is missing")
endif()
set(script "${CMAKE_CURRENT_LIST_DIR}/amalgamate.cmake")

set(declared [==[
#define PK_HARD(x) "a;b;;c" [[x]] ]] [=[ ${x} @x@ $ENV{HOME} \
    '\\' "\";\\;" '\n' \
    /* é, #[[ not a CMake comment ]] %d $<0:x> */

]==])
set(implemented [==[
#include <stddef.h>
static const char *text = "C:\\a\\;b[0];]"; /* odd brackets: ] [ [ */
	/* a tab before this, blanks after it */   
#define LAST \
    (1)
]==])
set(posix "#if defined(PATHKERNEL_IMPLEMENTATION)\n#define _POSIX_C_SOURCE 200809L\n#endif")

function(write_module module name upper head declarations implementation)
    file(WRITE "${WORK}/include/pathkernel/${module}.h"
        "/* ${name}: top; [comment */\n#ifndef PATHKERNEL_${upper}_H\n#define PATHKERNEL_${upper}_H\n${head}\n"
        "/* >>> declarations */\n${declarations}/* <<< declarations */\n#endif\n\n"
        "#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_${upper}_IMPLEMENTED)\n"
        "#define PATHKERNEL_${upper}_IMPLEMENTED\n"
        "/* >>> implementation */\n${implementation}/* <<< implementation */\n#endif\n")
endfunction()

set(internal_guard "#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \\\n    !defined(PATHKERNEL_ALPHA_INTERNALS_KNOWN)\n#define PATHKERNEL_ALPHA_INTERNALS_KNOWN\n")
# Gives the second module a region of internals.
function(add_internals guard)
    file(READ "${WORK}/include/pathkernel/base/alpha.h" text)
    string(REPLACE "/* <<< declarations */\n#endif\n\n"
        "/* <<< declarations */\n#endif\n\n${guard}/* >>> internals */\nint inside;\n/* <<< internals */\n#endif\n\n" text "${text}")
    file(WRITE "${WORK}/include/pathkernel/base/alpha.h" "${text}")
endfunction()

function(reset)
    file(REMOVE_RECURSE "${WORK}")
    file(WRITE "${WORK}/cmake/modules.txt" "# a comment; with [ signs\nbase/status\nbase/alpha\nover/gamma\n")
    file(WRITE "${WORK}/include/pathkernel/overview.txt" "made: a;b [c] \\;\n\nEND\n")
    write_module(base/status status STATUS "\n${posix}\n" "int one;\n" "")
    write_module(base/alpha alpha ALPHA "#include \"status.h\"\n" "${declared}" "${implemented}")
    write_module(over/gamma gamma GAMMA "#include \"../base/alpha.h\"\n" "int three;\n" "")
endfunction()

function(generate result output)
    execute_process(COMMAND "${CMAKE_COMMAND}" -D "ROOT=${WORK}" ${ARGN} -P "${script}"
        RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
    set(${result} "${code}" PARENT_SCOPE)
    set(${output} "${text}" PARENT_SCOPE)
endfunction()

function(expect_refusal what words)
    generate(code text)
    string(REGEX REPLACE "[ \n]+" " " text "${text}")
    string(FIND "${text}" "${words}" at)
    if(code EQUAL 0 OR at EQUAL -1)
        message(FATAL_ERROR "${what}: a refusal with `${words}` was expected, but: ${code} ${text}")
    endif()
    if(EXISTS "${WORK}/pathkernel.h")
        message(FATAL_ERROR "${what}: refused, but a header was written")
    endif()
endfunction()

# Replaces text in the second module.
function(edit old new)
    file(READ "${WORK}/include/pathkernel/base/alpha.h" text)
    string(REPLACE "${old}" "${new}" changed "${text}")
    if(changed STREQUAL text)
        message(FATAL_ERROR "the test's own edit of `${old}` changes nothing")
    endif()
    file(WRITE "${WORK}/include/pathkernel/base/alpha.h" "${changed}")
endfunction()

reset()
generate(code text)
if(NOT code EQUAL 0)
    message(FATAL_ERROR "good modules were refused: ${text}")
endif()
file(WRITE "${WORK}/expected.h"
    "/* made: a;b [c] \\;\n *\n * END\n */\n"
    "/* Generated from the files in include/pathkernel. Change those, then: cmake -P cmake/amalgamate.cmake */\n\n"
    "${posix}\n\n#ifndef PATHKERNEL_H\n#define PATHKERNEL_H\n"
    "\n/* status: top; [comment */\nint one;\n"
    "\n/* alpha: top; [comment */\n${declared}"
    "\n/* gamma: top; [comment */\nint three;\n"
    "\n#endif /* PATHKERNEL_H */\n\n"
    "#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && !defined(PATHKERNEL_INTERNALS_DECLARED)\n"
    "#define PATHKERNEL_INTERNALS_DECLARED\n"
    "\n#endif /* internals */\n\n"
    "#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_IMPLEMENTED)\n"
    "#define PATHKERNEL_IMPLEMENTED\n"
    "\n/* pathkernel/base/status.h: implementation */\n"
    "\n/* pathkernel/base/alpha.h: implementation */\n${implemented}"
    "\n/* pathkernel/over/gamma.h: implementation */\n"
    "\n#endif /* PATHKERNEL_IMPLEMENTATION */\n")
execute_process(COMMAND "${CMAKE_COMMAND}" -E compare_files "${WORK}/pathkernel.h" "${WORK}/expected.h"
    RESULT_VARIABLE code)
if(NOT code EQUAL 0)
    message(FATAL_ERROR "${WORK}/pathkernel.h differs from ${WORK}/expected.h")
endif()

# A fresh header passes the check; one changed byte does not, and the command that mends it is named.
generate(code text -D CHECK=ON)
if(NOT code EQUAL 0)
    message(FATAL_ERROR "a fresh header was called stale: ${text}")
endif()
file(APPEND "${WORK}/pathkernel.h" "\n")
generate(code text -D CHECK=ON)
if(code EQUAL 0 OR NOT text MATCHES "cmake -P cmake/amalgamate.cmake")
    message(FATAL_ERROR "a stale header passed, or the message names no command: ${code} ${text}")
endif()

foreach(region IN ITEMS declarations implementation)
    foreach(mark IN ITEMS ">>>" "<<<")
        set(line "/* ${mark} ${region} */\n")
        reset()
        edit("${line}" "")
        expect_refusal("missing marker" "there is no line `/* ${mark} ${region} */`")
        reset()
        edit("${line}" "${line}${line}")
        expect_refusal("duplicated marker" "`${mark} ${region}` is there more than once")
        reset()
        edit("${line}" "  ${line}")
        expect_refusal("indented marker" "there is no line `/* ${mark} ${region} */`")
    endforeach()
    reset()
    edit("/* >>> ${region} */" "/* ??? ${region} */")
    edit("/* <<< ${region} */" "/* >>> ${region} */")
    edit("/* ??? ${region} */" "/* <<< ${region} */")
    expect_refusal("exchanged markers" "`<<< ${region}` stands before `>>> ${region}`")
endforeach()
reset()
add_internals("${internal_guard}")
generate(code text)
file(READ "${WORK}/pathkernel.h" made)
if(NOT code EQUAL 0 OR NOT made MATCHES "#define PATHKERNEL_INTERNALS_DECLARED\n\n/. pathkernel/base/alpha.h: internals ./\nint inside;\n\n#endif")
    message(FATAL_ERROR "internals are not where they belong: ${text} ${made}")
endif()
reset()
add_internals("#if 1\n")
expect_refusal("internals under another guard" "between declarations and internals there must be exactly")
reset()
edit("#include \"status.h\"\n" "#include \"beta.h\"\n")
expect_refusal("an include that is not above" "only includes of modules above it")
reset()
edit("#include \"status.h\"\n" "#include \"../over/gamma.h\"\n")
expect_refusal("an include that goes up" "only includes of modules above it")
reset()
edit("#include \"status.h\"\n" "#include \"../base/status.h\"\n")
expect_refusal("a way around to the own folder" "only includes of modules above it")
reset()
file(WRITE "${WORK}/cmake/modules.txt" "base/status\nover/gamma\nbase/alpha\n")
write_module(over/gamma gamma GAMMA "" "" "")
expect_refusal("a folder in two pieces" "base/alpha stands apart from the other files of base/")
reset()
file(APPEND "${WORK}/cmake/modules.txt" "alone\n")
expect_refusal("a module without a folder" "`alone` is not folder/file")
reset()
edit("#include \"status.h\"\n" "#include \"status.h\"\nint lost;\n")
expect_refusal("code before the declarations" "only includes of modules above it")
reset()
edit("/* <<< declarations */\n" "/* <<< declarations */\nint lost;\n")
expect_refusal("code between the regions" "between declarations and implementation there must be exactly")
reset()
edit("/* <<< implementation */\n" "/* <<< implementation */\nint lost;\n")
expect_refusal("code after the implementation" "after the implementation there must be exactly")
reset()
edit("#define LAST" "#include \"status.h\"\n#define LAST")
expect_refusal("an include between markers" "stands between markers")
reset()
edit("#define LAST" "\r\n#define LAST")
expect_refusal("carriage return" "holds a carriage return")
reset()
file(WRITE "${WORK}/include/pathkernel/overview.txt" "ends */ here\n")
expect_refusal("comment end in the overview" "would end the comment")
reset()
file(APPEND "${WORK}/cmake/modules.txt" "over/beta\n")
expect_refusal("a missing module" "beta.h is listed in cmake/modules.txt, but is not there")
file(REMOVE_RECURSE "${WORK}")
message(STATUS "amalgamate.cmake: byte for byte, and every broken module is refused")
