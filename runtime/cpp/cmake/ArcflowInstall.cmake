# Installs the library with what it needs of OpenVINO, its headers, a CMake package (arcflow::arcflow), a pkg-config file
# and licences. All paths in the installed folder are relative, so the folder can be moved to another machine.
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/arcflow)
set(licences ${CMAKE_INSTALL_DATADIR}/licenses/arcflow)
install(TARGETS arcflow EXPORT arcflow-targets)
install(DIRECTORY include/arcflow DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT arcflow-targets NAMESPACE arcflow:: DESTINATION ${package})

# arcflow_install_licences(<name> <glob>...): the licences of a library whose code is in the installed folder.
function(arcflow_install_licences name)
    file(GLOB found ${ARGN})
    if(found)
        install(FILES ${found} DESTINATION ${licences}/${name})
    else()
        message(WARNING "no licence of ${name} was found; add it to ${licences}/${name} before you distribute the "
                        "installed folder")
    endif()
endfunction()
arcflow_install_licences(arcflow ${CMAKE_CURRENT_SOURCE_DIR}/../../LICENSE)
arcflow_install_licences(nlohmann_json ${nlohmann_json_package}/../nlohmann_json-*.dist-info/licenses/LICENSE
                         ${nlohmann_json_DIR}/../../licenses/nlohmann-json/LICENSE*
                         /usr/share/doc/nlohmann-json3-dev/copyright)

set(ARCFLOW_DEPENDENCIES "")
set(ARCFLOW_PC_PRIVATE "-lcrypto -lpthread -ldl -lstdc++ -lm")
if(ARCFLOW_OPENVINO)
    get_target_property(openvino openvino::runtime IMPORTED_LOCATION_RELEASE)
    get_filename_component(openvino_libraries ${openvino} DIRECTORY)
    # The file that programs load, which in OpenVINO's archives is a link to a longer name.
    get_target_property(openvino_name openvino::runtime IMPORTED_SONAME_RELEASE)
    if(NOT openvino_name)
        get_filename_component(openvino_name ${openvino} NAME)
    endif()
endif()
if(ARCFLOW_OPENVINO AND ARCFLOW_INSTALL_OPENVINO)
    # The CPU plugin, the readers of ONNX graphs and of OpenVINO's own (for tokenizers), and oneTBB. OpenVINO's archives
    # have oneTBB in a folder of its own.
    set(wanted libopenvino.so* libopenvino_intel_cpu_plugin.so libopenvino_arm_cpu_plugin.so
               libopenvino_onnx_frontend.so* libopenvino_ir_frontend.so*)
    set(wanted_of_tbb libtbb.so* libtbbmalloc.so* libtbbbind*.so* libhwloc.so*)
    list(TRANSFORM wanted PREPEND ${openvino_libraries}/)
    foreach(folder ${openvino_libraries} ${openvino_libraries}/../../3rdparty/tbb/lib)
        list(TRANSFORM wanted_of_tbb PREPEND ${folder}/ OUTPUT_VARIABLE there)
        list(APPEND wanted ${there})
    endforeach()
    file(GLOB libraries ${wanted})
    if(ARCFLOW_OPENVINO_TOKENIZERS)
        list(APPEND libraries ${ARCFLOW_OPENVINO_TOKENIZERS})
    endif()
    install(FILES ${libraries} DESTINATION ${CMAKE_INSTALL_LIBDIR})
    set_target_properties(arcflow PROPERTIES INSTALL_RPATH "\$ORIGIN")
    arcflow_install_licences(openvino ${openvino_dir}/../openvino-2*.dist-info/licenses/LICENSE
                             ${openvino_dir}/../openvino-2*.dist-info/licenses/licensing/*
                             ${OpenVINO_DIR}/../../docs/licensing/*)
    if(ARCFLOW_OPENVINO_TOKENIZERS)
        arcflow_install_licences(openvino_tokenizers
                                 ${openvino_tokenizers_dir}/../openvino_tokenizers-*.dist-info/LICENSE
                                 ${openvino_tokenizers_dir}/../openvino_tokenizers-*.dist-info/third-party-programs.txt)
    endif()
    if(NOT BUILD_SHARED_LIBS)
        string(APPEND ARCFLOW_DEPENDENCIES
"if(NOT TARGET openvino::runtime)
    add_library(openvino::runtime SHARED IMPORTED)
    set_target_properties(openvino::runtime PROPERTIES
        IMPORTED_LOCATION \${PACKAGE_PREFIX_DIR}/${CMAKE_INSTALL_LIBDIR}/${openvino_name})
endif()
")
        string(PREPEND ARCFLOW_PC_PRIVATE "-L\${libdir} -l:${openvino_name} -Wl,-rpath,\${libdir} ")
    endif()
elseif(ARCFLOW_OPENVINO)
    set_target_properties(arcflow PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
    if(NOT BUILD_SHARED_LIBS)
        string(APPEND ARCFLOW_DEPENDENCIES "find_dependency(OpenVINO COMPONENTS Runtime HINTS \"${OpenVINO_DIR}\")\n")
        string(PREPEND ARCFLOW_PC_PRIVATE "${openvino} -Wl,-rpath,${openvino_libraries} ")
    endif()
endif()
if(NOT BUILD_SHARED_LIBS)
    string(APPEND ARCFLOW_DEPENDENCIES "find_dependency(OpenSSL COMPONENTS Crypto)\nfind_dependency(Threads)\n")
endif()

configure_package_config_file(cmake/arcflow-config.cmake.in arcflow-config.cmake INSTALL_DESTINATION ${package})
# Until 1.0 a new minor version may change the API: find_package(arcflow 0.1) takes 0.1.x only.
write_basic_package_version_file(arcflow-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/arcflow-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/arcflow-config-version.cmake
        DESTINATION ${package})

file(RELATIVE_PATH ARCFLOW_PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/arcflow.pc.in arcflow.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/arcflow.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
