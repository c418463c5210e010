# Embeds the kernels (runtime/kernels): their source, and the fatbin that build.py made from it if there is one.
#
#   arcflow_embed_kernel(TARGET)   makes kernels_embedded.h and lets the target include it
set(ARCFLOW_KERNELS ${CMAKE_CURRENT_LIST_DIR}/../../kernels)

# Appends a file to `source` in the caller, after the files that it includes, each once: the text of build.py's program().
macro(arcflow_append_kernel name)
    if(NOT ${name} IN_LIST appended)
        list(APPEND appended ${name})
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${ARCFLOW_KERNELS}/${name})
        file(STRINGS ${ARCFLOW_KERNELS}/${name} includes REGEX "^#include \"")
        foreach(line IN LISTS includes)
            string(REGEX REPLACE "#include \"(.*)\"" "\\1" included ${line})
            arcflow_append_kernel(${included})
        endforeach()
        file(READ ${ARCFLOW_KERNELS}/${name} text)
        string(REGEX REPLACE "#include \"[^\n]*\n" "" text "${text}")
        string(APPEND source "${text}")
    endif()
endmacro()

function(arcflow_embed_kernel target)
    set(source "")
    set(appended "")
    arcflow_append_kernel(noise.cu)
    set(fatbin "0x00")
    set(fatbin_bytes 0)
    file(GLOB made CONFIGURE_DEPENDS ${ARCFLOW_KERNELS}/arcflow.fatbin ${ARCFLOW_KERNELS}/arcflow.fatbin.json)
    list(LENGTH made count)
    if(count EQUAL 2)
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${ARCFLOW_KERNELS}/arcflow.fatbin)
        file(READ ${ARCFLOW_KERNELS}/arcflow.fatbin.json about)
        string(JSON made_from GET "${about}" source_sha256)
        string(SHA256 this_source "${source}")
        if(made_from STREQUAL this_source)
            file(READ ${ARCFLOW_KERNELS}/arcflow.fatbin hexadecimal HEX)
            string(LENGTH "${hexadecimal}" digits)
            math(EXPR fatbin_bytes "${digits} / 2")
            string(REGEX REPLACE "(..)" "0x\\1," fatbin "${hexadecimal}")
        else()
            message(WARNING "arcflow.fatbin was made from another source; make it again with runtime/kernels/build.py")
        endif()
    endif()
    file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/kernel/kernels_embedded.h @ONLY CONTENT
"// Made by ArcflowKernel.cmake.
#pragma once

#include <cstddef>

static const char kernels_source[] = R\"kernel(@source@)kernel\";
alignas(16) static const unsigned char kernels_fatbin[] = {@fatbin@};
static const std::size_t kernels_fatbin_bytes = @fatbin_bytes@;
")
    target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/kernel)
endfunction()
