# What of the TensorRT engines needs no headers of theirs: run by tests/test_cpp_trt.py.
include(ArcflowKernel)
set(trt ${CMAKE_CURRENT_SOURCE_DIR}/../src)
add_executable(trt_tool trt_tool.cpp ${trt}/trt_cuda.cpp ${trt}/trt_kernel.cpp ${trt}/trt_library.cpp
               ${trt}/trt_record.cpp)
target_link_libraries(trt_tool PRIVATE arcflow_core ${CMAKE_DL_LIBS})
arcflow_embed_kernel(trt_tool)
