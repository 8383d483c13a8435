# What the implementation of pathkernel is compiled and linked with. The build and the installed package
# both use this file, so that a user's own compiler decides about OpenMP, not the one that installed.

# Links an INTERFACE library to libm, BLIS and OpenMP. blis and openmp are each ON (must be there), OFF, or
# AUTO (used where it is found).
function(pathkernel_link_dependencies target blis openmp)
    foreach(option IN ITEMS blis openmp)
        string(TOUPPER "${${option}}" ${option})
        if(${option} MATCHES "^(ON|YES|TRUE|Y|1)$")
            set(${option}_required REQUIRED)
        elseif(${option} STREQUAL "AUTO")
            set(${option}_required QUIET)
        elseif(${option} MATCHES "^(OFF|NO|FALSE|N|0)$")
            unset(${option}_required)
        else()
            message(FATAL_ERROR "pathkernel: the option `${${option}}` is neither ON, OFF nor AUTO")
        endif()
    endforeach()

    target_link_libraries(${target} INTERFACE -lm) # not `m`: a user may have a target of that name

    if(blis_required)
        list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
        find_package(BLIS ${blis_required})
        if(BLIS_FOUND)
            target_compile_definitions(${target} INTERFACE PATHKERNEL_BLIS)
            target_link_libraries(${target} INTERFACE BLIS::BLIS)
        endif()
    endif()

    if(openmp_required)
        foreach(language IN ITEMS C CXX)
            if(CMAKE_${language}_COMPILER_LOADED)
                find_package(OpenMP ${openmp_required} COMPONENTS ${language})
                if(TARGET OpenMP::OpenMP_${language})
                    target_link_libraries(${target} INTERFACE OpenMP::OpenMP_${language})
                endif()
            endif()
        endforeach()
    endif()

    # What was found, for the caller to print and to write down.
    foreach(what IN ITEMS BLIS_FOUND OpenMP_C_FOUND OpenMP_CXX_FOUND OpenMP_C_FLAGS)
        set(${what} "${${what}}" PARENT_SCOPE)
    endforeach()
endfunction()
