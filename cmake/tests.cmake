# The tests. Included by CMakeLists.txt.
find_path(CMOCKA_INCLUDE_DIR cmocka.h)
find_library(CMOCKA_LIBRARY cmocka)
mark_as_advanced(CMOCKA_INCLUDE_DIR CMOCKA_LIBRARY)
if(NOT CMOCKA_INCLUDE_DIR OR NOT CMOCKA_LIBRARY)
    message(FATAL_ERROR "PATHKERNEL_TESTS needs cmocka (Debian: libcmocka-dev)")
endif()

if(NOT PATHKERNEL_EXAMPLES)
    message(FATAL_ERROR "PATHKERNEL_TESTS tests the examples and the program too: set PATHKERNEL_EXAMPLES=ON")
endif()

# ---- tests/test_<name>.c, each with the modules and with the single header.
set(tests context parallel tile matrix random array dataset graph image convolution_shapes norm sequence language loss
    derivatives optimizer run revisit train path quadrature integral plan decompose_exact decompose_options
    decompose_image decompose_places decompose_networks decompose_entries recorded reference scales rough_runs tolerance
    kernel elementary measure machine influence bounds tied groups state kernels kernel_pieces kernel_limits smoother sensitivity novelty
    sketch nodes compare layout allocation stack determinism environment kill program corpus)
list(TRANSFORM tests REPLACE "(.+)" "tests/test_\\1.c" OUTPUT_VARIABLE sources)
pathkernel_expect("tests/test_*.c" ${sources})

foreach(variant IN LISTS PATHKERNEL_TEST_VARIANTS)
    add_library(test_${variant} STATIC tests/implementation.c)
    target_include_directories(test_${variant} SYSTEM PUBLIC "${CMOCKA_INCLUDE_DIR}")
    target_include_directories(test_${variant} PUBLIC tests)
    target_compile_definitions(test_${variant} PUBLIC PATHKERNEL_INTERNALS)
    target_link_libraries(test_${variant} PUBLIC pathkernel pathkernel_warnings "${CMOCKA_LIBRARY}"
                          PRIVATE pathkernel_frames)
    if(variant STREQUAL "amalgam")
        target_compile_definitions(test_${variant} PUBLIC PATHKERNEL_TEST_AMALGAM)
    elseif(NOT variant STREQUAL "modules")
        message(FATAL_ERROR "PATHKERNEL_TEST_VARIANTS: `${variant}` is neither modules nor amalgam")
    endif()
    foreach(test IN LISTS tests)
        add_executable(test_${test}_${variant} tests/test_${test}.c)
        target_link_libraries(test_${test}_${variant} PRIVATE test_${variant})
        add_test(NAME ${test}.${variant} COMMAND test_${test}_${variant}
            WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}")
        set_tests_properties(${test}.${variant} PROPERTIES LABELS ${variant} TIMEOUT 600
            ENVIRONMENT "PATHKERNEL_DECOMPOSE=$<TARGET_FILE:pathkernel-decompose>")
    endforeach()
    # Calls that tests/failing_calls.h makes fail.
    if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
        set(calls open openat close read pread write pwrite rename renameat fsync fdatasync ftruncate mkdir mkdirat fstat
            flock mmap malloc calloc realloc aligned_alloc posix_memalign)
        list(TRANSFORM calls PREPEND "-Wl,--wrap=")
        target_link_options(test_corpus_${variant} PRIVATE ${calls})
        target_compile_definitions(test_corpus_${variant} PRIVATE FAILING_CALLS)
    endif()
endforeach()

# ---- Random runs of all kinds against brute force: a few here, any number by hand (tests/bounds_campaign.c).
list(GET PATHKERNEL_TEST_VARIANTS 0 variant)
add_executable(bounds_campaign tests/bounds_campaign.c)
target_link_libraries(bounds_campaign PRIVATE test_${variant})
if(NOT PATHKERNEL_FLOAT)
    add_test(NAME bounds_campaign COMMAND bounds_campaign 40 1)
    set_tests_properties(bounds_campaign PROPERTIES TIMEOUT 600)
endif()

# ---- Each header by itself: declarations and implementation as strict C11, declarations as C++17. To compile is the test.
if(PATHKERNEL_CHECK_HEADERS)
    set(headers pathkernel.h)
    foreach(module IN LISTS PATHKERNEL_MODULES)
        list(APPEND headers pathkernel/${module}.h)
    endforeach()

    set(units "")
    function(header_unit mode header switches)
        string(MAKE_C_IDENTIFIER "${mode}_${header}" name)
        set(unit "${CMAKE_CURRENT_BINARY_DIR}/headers/${name}")
        foreach(suffix IN ITEMS c cpp)
            file(CONFIGURE OUTPUT "${unit}.${suffix}" CONTENT "${switches}#include <${header}>\n" @ONLY)
        endforeach()
        set(units ${units} "${unit}" PARENT_SCOPE)
    endfunction()
    foreach(header IN LISTS headers)
        header_unit(declarations ${header} "")
        header_unit(implementation ${header} "#define PATHKERNEL_IMPLEMENTATION\n")
    endforeach()
    header_unit(static pathkernel.h "#define PATHKERNEL_IMPLEMENTATION\n#define PATHKERNEL_STATIC\n")
    header_unit(float pathkernel.h "#define PATHKERNEL_IMPLEMENTATION\n#undef PATHKERNEL_FLOAT\n#define PATHKERNEL_FLOAT\n")

    list(TRANSFORM units APPEND ".c" OUTPUT_VARIABLE c_units)
    set(cxx_units ${units})
    list(FILTER cxx_units INCLUDE REGEX "/declarations_")
    list(TRANSFORM cxx_units APPEND ".cpp")
    add_library(headers_c11 OBJECT ${c_units})
    set_target_properties(headers_c11 PROPERTIES C_STANDARD 11 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF)
    set(header_checks headers_c11)
    if(CMAKE_CXX_COMPILER_LOADED)
        add_library(headers_cxx17 OBJECT ${cxx_units})
        set_target_properties(headers_cxx17 PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
        list(APPEND header_checks headers_cxx17)
    endif()
    foreach(check IN LISTS header_checks)
        target_link_libraries(${check} PRIVATE pathkernel pathkernel_warnings)
        target_compile_options(${check} PRIVATE -O0)
    endforeach()
endif()

# ---- The compiled library. Not with msan or asan, whose libraries are not shared.
find_program(OBJDUMP objdump)
mark_as_advanced(OBJDUMP)
if(PATHKERNEL_SHARED AND OBJDUMP)
    add_test(NAME registers
        COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/registers.sh" $<TARGET_FILE:pathkernel_shared>)
endif()

# ---- The single header is what the modules give, and its generator works.
add_test(NAME amalgam_is_current COMMAND "${CMAKE_COMMAND}" -D CHECK=ON
    -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/amalgamate.cmake")
add_test(NAME amalgamate COMMAND "${CMAKE_COMMAND}" -D "WORK=${CMAKE_CURRENT_BINARY_DIR}/amalgamate"
    -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/amalgamate_test.cmake")

# ---- What a user does: the tutorials and the studies, which check themselves; one header in an empty folder; an installed
# package. The scripts print what they leave out and why.
if(PATHKERNEL_CHECK_USE)
    function(example_test name program)
        add_test(NAME example.${name} COMMAND ${program} ${ARGN} "${runs}" "${CMAKE_CURRENT_SOURCE_DIR}/examples/data")
        set_tests_properties(example.${name} PROPERTIES LABELS example TIMEOUT 600)
    endfunction()
    example_test(00_by_hand 00_by_hand)
    example_test(01_quickstart 01_quickstart)
    example_test(02_digits_report_tanh 02_digits_report tanh)
    example_test(02_digits_report_relu 02_digits_report relu)
    example_test(03_quadrature 03_quadrature)
    example_test(04_own_loop 04_own_loop)
    example_test(05_convolution 05_convolution)
    example_test(06_reverse_time 06_reverse_time)
    example_test(07_long_runs 07_long_runs)
    example_test(08_own_operation 08_own_operation)
    example_test(09_kernels_on_a_run 09_kernels_on_a_run)
    example_test(10_which_approximation 10_which_approximation)
    example_test(11_single_machine 11_single_machine)
    example_test(graph_network graph_network)
    example_test(grokking grokking steps=40)

    add_test(NAME dropin COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/dropin/run.sh")
    add_test(NAME installed COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/installed/run.sh"
        "${CMAKE_CURRENT_BINARY_DIR}")
    set_tests_properties(dropin installed PROPERTIES LABELS user TIMEOUT 600
        ENVIRONMENT "CMAKE=${CMAKE_COMMAND};CC=${CMAKE_C_COMPILER};CXX=${CMAKE_CXX_COMPILER}")
endif()
