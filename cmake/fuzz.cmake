# The fuzz targets under libFuzzer, each of which runs for a bounded time as a test: all in one program, which takes
# the target's name from the environment. Included by CMakeLists.txt. What a target finds new goes into
# <build>/corpus/<target>; an input that fails is named in the log and stands in <build>/failures: keep it in
# tests/corpus/regressions/<target>, which test_corpus runs in every configuration.
if(NOT CMAKE_C_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "PATHKERNEL_FUZZ needs clang (CMAKE_C_COMPILER=clang)")
endif()
set(PATHKERNEL_FUZZ_SECONDS 10 CACHE STRING "How long each fuzz target runs as a test")
enable_testing()

set(targets array execute folder manifest network program)
list(TRANSFORM targets REPLACE "(.+)" "tests/fuzz_\\1.c" OUTPUT_VARIABLE sources)
pathkernel_expect("tests/fuzz_*.c" ${sources})
set(corpus "${CMAKE_CURRENT_SOURCE_DIR}/tests/corpus")
set(failures "${CMAKE_CURRENT_BINARY_DIR}/failures")
file(MAKE_DIRECTORY "${failures}")
# Comparisons are not traced: those of the inner loops would take half of the time, and words are in the dictionary.
set(sanitizers -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all
    -fno-sanitize-coverage=trace-cmp)

add_executable(fuzz tests/fuzz.c)
target_link_libraries(fuzz PRIVATE pathkernel pathkernel_warnings)
target_include_directories(fuzz PRIVATE tests)
target_compile_options(fuzz PRIVATE ${sanitizers})
target_link_options(fuzz PRIVATE ${sanitizers})
math(EXPR limit "${PATHKERNEL_FUZZ_SECONDS} + 600")
foreach(target IN LISTS targets)
    set(found "${CMAKE_CURRENT_BINARY_DIR}/corpus/${target}")
    set(folders "${found}" "${corpus}/${target}")
    if(EXISTS "${corpus}/regressions/${target}")
        list(APPEND folders "${corpus}/regressions/${target}")
    endif()
    file(MAKE_DIRECTORY "${found}")
    add_test(NAME fuzz.${target} COMMAND fuzz -seed=1 -max_total_time=${PATHKERNEL_FUZZ_SECONDS} -timeout=60
        -max_len=2048 -rss_limit_mb=2048 -print_final_stats=1 "-dict=${corpus}/dictionary"
        "-artifact_prefix=${failures}/${target}-" ${folders})
    set_tests_properties(fuzz.${target} PROPERTIES LABELS fuzz TIMEOUT ${limit}
        ENVIRONMENT "PATHKERNEL_FUZZ_TARGET=${target}")
endforeach()
