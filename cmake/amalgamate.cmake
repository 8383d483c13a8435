# Writes pathkernel.h from include/pathkernel/, or checks that it is up to date. Needs nothing but CMake.
#
#   cmake -P cmake/amalgamate.cmake                   write
#   cmake -D CHECK=ON -P cmake/amalgamate.cmake       fail when the committed file differs
#
# -D ROOT=... (the repository) and -D OUTPUT=... (the header) change where things are.
#
# The header is, in this order: the overview as its top comment; what status.h does before its first
# declaration (feature macros); under PATHKERNEL_H the declarations of each module under its own top
# comment; outside of that guard, where PATHKERNEL_IMPLEMENTATION is defined, all implementations.
# Text between markers is copied byte for byte. Text outside of them must be the frame that every module
# has, so that nothing can be lost on the way.
cmake_minimum_required(VERSION 3.25)

if(NOT ROOT)
    get_filename_component(ROOT "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
endif()
if(NOT OUTPUT)
    set(OUTPUT "${ROOT}/pathkernel.h")
endif()

# ${before}, ${inside} and ${after} of the one region `/* >>> name */ ... /* <<< name */` of text.
function(split_region file name text before inside after)
    foreach(side IN ITEMS start stop)
        if(side STREQUAL "start")
            set(mark ">>> ${name}")
        else()
            set(mark "<<< ${name}")
        endif()
        set(line "\n/* ${mark} */\n")
        string(FIND "${text}" "${mark}" first)
        string(FIND "${text}" "${mark}" last REVERSE)
        string(FIND "${text}" "${line}" at)
        if(at EQUAL -1)
            message(FATAL_ERROR "${file}: there is no line `/* ${mark} */`")
        elseif(NOT first EQUAL last)
            message(FATAL_ERROR "${file}: `${mark}` is there more than once")
        endif()
        string(LENGTH "${line}" length)
        math(EXPR ${side} "${at} + 1")
        math(EXPR ${side}_end "${at} + ${length}")
    endforeach()
    if(stop LESS start)
        message(FATAL_ERROR "${file}: `<<< ${name}` stands before `>>> ${name}`")
    endif()
    math(EXPR length "${stop} - ${start_end}")
    string(SUBSTRING "${text}" 0 ${start} head)
    string(SUBSTRING "${text}" ${start_end} ${length} body)
    string(SUBSTRING "${text}" ${stop_end} -1 tail)
    set(${before} "${head}" PARENT_SCOPE)
    set(${inside} "${body}" PARENT_SCOPE)
    set(${after} "${tail}" PARENT_SCOPE)
endfunction()

# A text file as a comment; an empty line gets no blank at its end.
function(comment_from file result)
    file(READ "${file}" text)
    string(FIND "${text}" "*/" at)
    if(NOT at EQUAL -1)
        message(FATAL_ERROR "${file}: `*/` would end the comment that this text becomes")
    endif()
    string(REGEX REPLACE "\n+$" "" text "${text}")
    string(REPLACE "\n" "\n * " text "${text}")
    string(REPLACE " * \n" " *\n" text "${text}")
    set(${result} "/* ${text}\n */\n" PARENT_SCOPE)
endfunction()

# Names of a list of modules: folder/file, the files of a folder one after the other. A folder is a layer: its files include
# each other downwards, and those of folders above it in the list.
file(STRINGS "${ROOT}/cmake/modules.txt" modules REGEX "^[a-z]")
set(folders "")
set(declarations "")
set(internals "")
set(implementations "")
set(prologue "")
set(above "")
foreach(module IN LISTS modules)
    set(file "include/pathkernel/${module}.h")
    if(NOT module MATCHES "^([a-z]+)/([a-z]+)$")
        message(FATAL_ERROR "cmake/modules.txt: `${module}` is not folder/file")
    endif()
    set(folder "${CMAKE_MATCH_1}")
    set(name "${CMAKE_MATCH_2}")
    list(FIND folders "${folder}" at)
    set(last "")
    if(folders)
        list(GET folders -1 last)
    endif()
    if(at EQUAL -1)
        list(APPEND folders "${folder}")
    elseif(NOT folder STREQUAL last)
        message(FATAL_ERROR "cmake/modules.txt: ${module} stands apart from the other files of ${folder}/")
    endif()
    if(NOT EXISTS "${ROOT}/${file}")
        message(FATAL_ERROR "${file} is listed in cmake/modules.txt, but is not there")
    endif()
    file(READ "${ROOT}/${file}" text)
    file(SHA256 "${ROOT}/${file}" in_file)
    string(SHA256 in_memory "${text}")
    if(NOT in_file STREQUAL in_memory) # file(READ) drops these bytes
        message(FATAL_ERROR "${file}: holds a carriage return or a zero byte")
    endif()
    set(internal "")
    split_region("${file}" declarations "${text}" before declared rest)
    split_region("${file}" implementation "${rest}" between implemented after)

    # The frame: a comment, the guard, includes of modules above, the regions, nothing else.
    string(TOUPPER "${name}" upper)
    set(guard "#ifndef PATHKERNEL_${upper}_H\n#define PATHKERNEL_${upper}_H\n")
    string(FIND "${before}" "${guard}" at)
    if(at EQUAL -1)
        message(FATAL_ERROR "${file}: the include guard PATHKERNEL_${upper}_H is missing")
    endif()
    string(SUBSTRING "${before}" 0 ${at} top)
    string(LENGTH "${guard}" length)
    math(EXPR at "${at} + ${length}")
    string(SUBSTRING "${before}" ${at} -1 head)
    if(NOT top MATCHES "^/\\*.*\\*/\n$")
        message(FATAL_ERROR "${file}: a module begins with a comment that tells what it is, then its guard")
    endif()
    foreach(include IN LISTS above)
        string(REGEX REPLACE "^${folder}/" "" near "${include}")
        if(near STREQUAL include)
            set(near "../${include}")
        endif()
        string(REPLACE "#include \"${near}.h\"\n" "" head "${head}")
    endforeach()
    if(module STREQUAL "base/status")
        string(STRIP "${head}" prologue)
    else()
        string(STRIP "${head}" head)
        if(NOT head STREQUAL "")
            message(FATAL_ERROR "${file}: only includes of modules above it in cmake/modules.txt may stand "
                                "before the declarations, but there is:\n${head}")
        endif()
    endif()
    string(FIND "${between}" "/* >>> internals */" at)
    if(NOT at EQUAL -1)
        split_region("${file}" internals "${between}" head internal tail)
        set(frame "#endif\n\n#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \\\n    ")
        string(APPEND frame "!defined(PATHKERNEL_${upper}_INTERNALS_KNOWN)\n#define PATHKERNEL_${upper}_INTERNALS_KNOWN\n")
        if(NOT head STREQUAL frame)
            message(FATAL_ERROR "${file}: between declarations and internals there must be exactly\n${frame}"
                                "but there is\n${head}")
        endif()
        string(APPEND internals "\n/* pathkernel/${module}.h: internals */\n${internal}")
        set(between "${tail}")
    endif()
    set(frame "#endif\n\n#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_${upper}_IMPLEMENTED)\n")
    string(APPEND frame "#define PATHKERNEL_${upper}_IMPLEMENTED\n")
    if(NOT between STREQUAL frame)
        message(FATAL_ERROR "${file}: between declarations and implementation there must be exactly\n${frame}"
                            "but there is\n${between}")
    endif()
    if(NOT after STREQUAL "#endif\n")
        message(FATAL_ERROR "${file}: after the implementation there must be exactly\n#endif\nbut there is\n"
                            "${after}")
    endif()
    foreach(region IN ITEMS declared internal implemented)
        if("\n${${region}}" MATCHES "\n[ \t]*#[ \t]*include[ \t]*(\"[^\"]*\")")
            message(FATAL_ERROR "${file}: #include ${CMAKE_MATCH_1} stands between markers")
        endif()
    endforeach()

    string(APPEND declarations "\n${top}${declared}")
    string(APPEND implementations "\n/* pathkernel/${module}.h: implementation */\n${implemented}")
    list(APPEND above "${module}")
endforeach()

comment_from("${ROOT}/include/pathkernel/overview.txt" overview)
string(CONCAT header
    "${overview}"
    "/* Generated from the files in include/pathkernel. Change those, then: cmake -P cmake/amalgamate.cmake */\n\n"
    "${prologue}\n\n"
    "#ifndef PATHKERNEL_H\n"
    "#define PATHKERNEL_H\n"
    "${declarations}"
    "\n#endif /* PATHKERNEL_H */\n\n"
    "#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && !defined(PATHKERNEL_INTERNALS_DECLARED)\n"
    "#define PATHKERNEL_INTERNALS_DECLARED\n"
    "${internals}"
    "\n#endif /* internals */\n\n"
    "#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_IMPLEMENTED)\n"
    "#define PATHKERNEL_IMPLEMENTED\n"
    "${implementations}"
    "\n#endif /* PATHKERNEL_IMPLEMENTATION */\n")

set(committed "")
if(EXISTS "${OUTPUT}")
    file(SHA256 "${OUTPUT}" committed)
endif()
string(SHA256 generated "${header}")
if(committed STREQUAL generated)
    message(STATUS "${OUTPUT} is up to date")
elseif(CHECK)
    message(FATAL_ERROR "pathkernel.h differs from what include/pathkernel gives. Write it anew with\n"
                        "  cmake -P cmake/amalgamate.cmake\n")
else()
    file(WRITE "${OUTPUT}" "${header}")
    message(STATUS "${OUTPUT} written")
endif()
