# What of the TensorRT engines needs no headers of theirs, so that it is built and run everywhere.
include(ArcflowKernel)
set(trt ${CMAKE_CURRENT_SOURCE_DIR}/../src)

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

# The CUDA graph with a driver and engines that run on the CPU.
add_library(fake_cuda SHARED fake/fake_cuda.cpp)
target_include_directories(fake_cuda PRIVATE ${ARCFLOW_KERNELS})
set_target_properties(fake_cuda PROPERTIES OUTPUT_NAME cuda SUFFIX .so.1 LIBRARY_OUTPUT_DIRECTORY fake)
add_executable(trt_denoiser_test trt_denoiser_test.cpp trt_parts.cpp ${trt}/trt_denoiser.cpp ${trt}/trt_engine.cpp
               ${trt}/trt_kernel.cpp ${trt}/trt_plan.cpp)
target_include_directories(trt_denoiser_test PRIVATE fake)
target_link_libraries(trt_denoiser_test PRIVATE trt_sources arcflow_core)
add_test(NAME trt_denoiser COMMAND trt_denoiser_test)
add_dependencies(trt_denoiser_test fake_cuda)
set_tests_properties(trt_denoiser PROPERTIES ENVIRONMENT "LD_LIBRARY_PATH=$<TARGET_FILE_DIR:fake_cuda>")

# With TensorRT's headers: a refitter and a runtime cache that are made of their interfaces.
if(ARCFLOW_TENSORRT AND TARGET arcflow_engines)
    add_executable(trt_adapters_test trt_adapters_test.cpp)
    target_link_libraries(trt_adapters_test PRIVATE arcflow_engines arcflow_core)
    add_test(NAME trt_adapters COMMAND trt_adapters_test)
endif()
