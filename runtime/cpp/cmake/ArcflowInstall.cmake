# Installs the library, its headers, a CMake package (arcflow::arcflow) and a pkg-config file.
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/arcflow)
install(TARGETS arcflow EXPORT arcflow-targets)
install(DIRECTORY include/arcflow DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT arcflow-targets NAMESPACE arcflow:: DESTINATION ${package})

# A program that links the static library links what it needs, too: OpenVINO where this build found it, whose file has
# a version in its name where it comes from PyPI.
set(ARCFLOW_DEPENDENCIES "")
set(ARCFLOW_PC_PRIVATE "-lcrypto -lpthread -ldl -lstdc++ -lm")
if(NOT BUILD_SHARED_LIBS)
    string(APPEND ARCFLOW_DEPENDENCIES "find_dependency(OpenSSL COMPONENTS Crypto)\nfind_dependency(Threads)\n")
    if(ARCFLOW_OPENVINO)
        string(APPEND ARCFLOW_DEPENDENCIES "find_dependency(OpenVINO COMPONENTS Runtime HINTS \"${OpenVINO_DIR}\")\n")
        get_target_property(openvino openvino::runtime IMPORTED_LOCATION_RELEASE)
        get_filename_component(openvino_libraries ${openvino} DIRECTORY)
        string(PREPEND ARCFLOW_PC_PRIVATE "${openvino} -Wl,-rpath,${openvino_libraries} ")
    endif()
endif()
configure_package_config_file(cmake/arcflow-config.cmake.in arcflow-config.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(arcflow-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/arcflow-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/arcflow-config-version.cmake
        DESTINATION ${package})

# Relative, so that the installed folder can be moved.
file(RELATIVE_PATH ARCFLOW_PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/arcflow.pc.in arcflow.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/arcflow.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
