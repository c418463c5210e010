# Engines of TensorRT and TensorRT-RTX: their headers are compiled against, their libraries opened at run time.
find_path(TENSORRT_INCLUDE_DIR NvInfer.h HINTS ${TRT_ROOT}/include)
find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${CUDA_ROOT}/include /usr/local/cuda/include)
if(NOT TENSORRT_INCLUDE_DIR OR NOT CUDA_INCLUDE_DIR)
    message(FATAL_ERROR "ARCFLOW_TENSORRT needs NvInfer.h and cuda_runtime_api.h; set TRT_ROOT to the folder of the "
                        "TensorRT or TensorRT-RTX SDK, and CUDA_ROOT to that of the CUDA toolkit")
endif()
file(GLOB tensorrt_sources CONFIGURE_DEPENDS src/trt_*.cpp)
target_sources(arcflow_engines PRIVATE ${tensorrt_sources})
target_compile_definitions(arcflow_engines PUBLIC ARCFLOW_WITH_TENSORRT)
target_include_directories(arcflow_engines SYSTEM PUBLIC ${TENSORRT_INCLUDE_DIR} ${CUDA_INCLUDE_DIR})
include(ArcflowKernel)
arcflow_embed_kernel(arcflow_engines)
