# What of the TensorRT engines needs no headers of theirs, so that it is built and run everywhere.
include(ArcflowKernel)
set(trt ${CMAKE_CURRENT_SOURCE_DIR}/../src)
set(trt_graph ${trt}/trt_arrays.cpp ${trt}/trt_buffers.cpp ${trt}/trt_denoiser.cpp ${trt}/trt_engine.cpp
              ${trt}/trt_kernel.cpp ${trt}/trt_lane.cpp ${trt}/trt_loras.cpp ${trt}/trt_memory.cpp ${trt}/trt_plan.cpp
              ${trt}/trt_shapes.cpp)

add_library(trt_sources OBJECT ${trt}/trt_cuda.cpp ${trt}/trt_library.cpp ${trt}/trt_record.cpp ${trt}/trt_refit.cpp
            ${trt}/trt_runtime_cache.cpp)
target_link_libraries(trt_sources PUBLIC arcflow_core Threads::Threads ${CMAKE_DL_LIBS})

# Run by tests/test_cpp_trt*.py.
add_executable(trt_tool trt_tool.cpp ${trt}/trt_kernel.cpp)
target_link_libraries(trt_tool PRIVATE trt_sources arcflow_core)
arcflow_embed_kernel(trt_tool)

foreach(name trt_refit trt_runtime_cache)
    add_executable(${name}_test ${name}_test.cpp)
    target_link_libraries(${name}_test PRIVATE trt_sources arcflow_core)
    add_test(NAME ${name} COMMAND ${name}_test)
endforeach()

# The CUDA graph on the driver made of host memory, which needs cuda.h of CUDA 13. Without it the test is skipped.
set(host_cuda ${CMAKE_CURRENT_SOURCE_DIR}/../../../tests/host_cuda)
set(host_cuda_folder ${CMAKE_CURRENT_BINARY_DIR}/host_cuda)
file(GLOB host_cuda_sources CONFIGURE_DEPENDS ${host_cuda}/*.cpp ${host_cuda}/*.h ${host_cuda}/build.py
     ${host_cuda}/../kernel_host.cpp ${host_cuda}/../kernel_source.py ${ARCFLOW_KERNELS}/*.h ${ARCFLOW_KERNELS}/*.cu)
execute_process(COMMAND ${ARCFLOW_PYTHON} ${host_cuda}/build.py --check RESULT_VARIABLE host_cuda_missing
                ERROR_VARIABLE host_cuda_why ERROR_STRIP_TRAILING_WHITESPACE)
add_executable(trt_denoiser_test trt_denoiser_test.cpp trt_modes_test.cpp trt_parts.cpp ${trt_graph})
target_include_directories(trt_denoiser_test PRIVATE fake)
target_link_libraries(trt_denoiser_test PRIVATE trt_sources arcflow_core)
# Under ThreadSanitizer only the test with threads: the driver's fibres make it many times slower.
if(ARCFLOW_SANITIZE STREQUAL "thread")
    add_test(NAME trt_denoiser COMMAND trt_denoiser_test threads)
else()
    add_test(NAME trt_denoiser COMMAND trt_denoiser_test)
    add_test(NAME trt_denoiser_modes COMMAND trt_denoiser_test modes)
    add_test(NAME trt_denoiser_failures COMMAND trt_denoiser_test failures)
    set_tests_properties(trt_denoiser_modes trt_denoiser_failures PROPERTIES LABELS slow)
    list(APPEND on_host_cuda trt_denoiser_modes trt_denoiser_failures)
endif()
list(APPEND on_host_cuda trt_denoiser)
if(host_cuda_missing)
    message(STATUS "tests on the driver made of host memory are disabled: ${host_cuda_why}")
    set_tests_properties(${on_host_cuda} PROPERTIES DISABLED ON)
else()
    add_custom_command(OUTPUT ${host_cuda_folder}/libcuda.so.1
                       COMMAND ${ARCFLOW_PYTHON} ${host_cuda}/build.py ${host_cuda_folder}
                       DEPENDS ${host_cuda_sources} VERBATIM)
    add_custom_target(host_cuda DEPENDS ${host_cuda_folder}/libcuda.so.1)
    add_dependencies(trt_denoiser_test host_cuda)
    set_tests_properties(${on_host_cuda} PROPERTIES ENVIRONMENT "LD_LIBRARY_PATH=${host_cuda_folder}")
endif()

# The whole library on that driver, with OpenVINO in the place of a GPU's engines: tests/test_cpp_host_cuda.py.
if(ARCFLOW_OPENVINO)
    add_library(arcflow_host_cuda SHARED EXCLUDE_FROM_ALL host_backends.cpp)
    target_link_libraries(arcflow_host_cuda PRIVATE arcflow_pipeline arcflow_engines arcflow_core)
    if(NOT ARCFLOW_TENSORRT)
        target_sources(arcflow_host_cuda PRIVATE ${trt_graph})
        target_link_libraries(arcflow_host_cuda PRIVATE trt_sources)
        arcflow_embed_kernel(arcflow_host_cuda)
    endif()
endif()

# With TensorRT's headers: a refitter and a runtime cache that are made of their interfaces.
if(ARCFLOW_TENSORRT AND TARGET arcflow_engines)
    add_executable(trt_adapters_test trt_adapters_test.cpp)
    target_link_libraries(trt_adapters_test PRIVATE arcflow_backends arcflow_engines arcflow_core)
    add_test(NAME trt_adapters COMMAND trt_adapters_test)
endif()
