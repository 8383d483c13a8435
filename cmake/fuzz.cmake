# The libFuzzer targets, each of which runs for a bounded time as a test. Included by CMakeLists.txt.
if(NOT CMAKE_C_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "PATHKERNEL_FUZZ needs clang (CMAKE_C_COMPILER=clang)")
endif()
set(PATHKERNEL_FUZZ_SECONDS 10 CACHE STRING "How long each libFuzzer target runs as a test")
enable_testing()

set(targets array network manifest)
list(TRANSFORM targets REPLACE "(.+)" "tests/fuzz_\\1.c" OUTPUT_VARIABLE sources)
pathkernel_expect("tests/fuzz_*.c" ${sources})
foreach(target IN LISTS targets)
    if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/tests/fuzz_${target}.c") # WHILE-WRITING
    add_executable(fuzz_${target} tests/fuzz_${target}.c)
    target_link_libraries(fuzz_${target} PRIVATE pathkernel pathkernel_warnings)
    target_include_directories(fuzz_${target} PRIVATE tests)
    target_compile_options(fuzz_${target} PRIVATE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
    target_link_options(fuzz_${target} PRIVATE -fsanitize=fuzzer,address,undefined)
    add_test(NAME fuzz.${target} COMMAND fuzz_${target} -seed=1 -max_total_time=${PATHKERNEL_FUZZ_SECONDS}
        -timeout=10 -max_len=2048 -rss_limit_mb=2048 -print_final_stats=1)
    set_tests_properties(fuzz.${target} PROPERTIES LABELS fuzz)
    endif() # WHILE-WRITING
endforeach()
