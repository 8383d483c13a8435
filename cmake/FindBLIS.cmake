# Finds BLIS (https://github.com/flame/blis), which comes without a package file in Debian.
#
#   BLIS_FOUND, BLIS_INCLUDE_DIR, BLIS_LIBRARY     set BLIS_ROOT to look in one place first
#   BLIS::BLIS                                     the imported target
find_path(BLIS_INCLUDE_DIR blis.h PATH_SUFFIXES blis)
find_library(BLIS_LIBRARY blis)
mark_as_advanced(BLIS_INCLUDE_DIR BLIS_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(BLIS REQUIRED_VARS BLIS_LIBRARY BLIS_INCLUDE_DIR)

if(BLIS_FOUND AND NOT TARGET BLIS::BLIS)
    add_library(BLIS::BLIS UNKNOWN IMPORTED)
    set_target_properties(BLIS::BLIS PROPERTIES
        IMPORTED_LOCATION "${BLIS_LIBRARY}"
        INTERFACE_INCLUDE_DIRECTORIES "${BLIS_INCLUDE_DIR}"
        INTERFACE_LINK_LIBRARIES -lm)
endif()
